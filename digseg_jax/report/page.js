"use strict";

// Gallery: a slider on each card, the choice of its right side, filter and order.
(() => {
  const cards = [...document.querySelectorAll(".card")];
  if (!cards.length) return;

  const { wire, choose, rove } = window.slider;

  // What is under the pointer: names by the colors of the two label images.
  const names = new Map();
  for (const chip of document.querySelectorAll(".chip[data-class]")) {
    const dot = chip.querySelector(".dot");
    if (dot) names.set(getComputedStyle(dot).backgroundColor.replaceAll(" ", ""), chip.dataset.class);
  }

  function pixels(card, what) {
    const labels = card.querySelector(`.thumb[data-what="${what}"] img`);
    const canvas = document.createElement("canvas");
    canvas.width = labels.naturalWidth;
    canvas.height = labels.naturalHeight;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(labels, 0, 0);
    return context.getImageData(0, 0, canvas.width, canvas.height);
  }

  function nameAt(map, x, y) {
    const column = Math.min(map.width - 1, Math.floor(x * map.width));
    const row = Math.min(map.height - 1, Math.floor(y * map.height));
    const place = 4 * (row * map.width + column);
    const [r, g, b] = map.data.slice(place, place + 3);
    return names.get(`rgb(${r},${g},${b})`) ?? "not labeled";
  }

  function inspect(card) {
    const stage = card.querySelector(".stage");
    const answer = card.querySelector(".under");
    let truth = null;
    let guess = null;
    stage.addEventListener("pointermove", (event) => {
      truth ??= pixels(card, "truth");
      guess ??= pixels(card, "prediction");
      const box = stage.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width;
      const y = (event.clientY - box.top) / box.height;
      if (x < 0 || y < 0 || x >= 1 || y >= 1) return;
      const found = [nameAt(truth, x, y), nameAt(guess, x, y)];
      answer.textContent = `truth: ${found[0]} · prediction: ${found[1]}`;
      answer.classList.toggle("wrong", found[0] !== found[1] && found[0] !== "not labeled");
    });
    stage.addEventListener("pointerleave", () => {
      answer.textContent = "";
    });
    // The same without a pointer: T puts the truth on the right, and back.
    card.querySelector(".handle").addEventListener("keydown", (event) => {
      if (event.key.toLowerCase() !== "t" || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      const shown = card.querySelector('.thumb[aria-pressed="true"]');
      const what = shown && shown.dataset.what === "truth" ? "prediction" : "truth";
      choose(card, card.querySelector(`.thumb[data-what="${what}"]`));
    });
  }

  cards.forEach(wire);
  cards.forEach(inspect);

  // All stages fade their right side together.
  const opacity = document.getElementById("opacity");
  opacity.addEventListener("input", () => {
    cards[0].parentElement.style.setProperty("--opacity", String(opacity.value / 100));
  });

  const chips = [...document.querySelectorAll(".chip")];
  const shown = document.getElementById("shown");

  // The Tab key stops at the chosen chip, or at the first if a search has hidden that.
  function stop() {
    const chosen = chips.find((chip) => chip.getAttribute("aria-pressed") === "true" && !chip.hidden);
    for (const chip of chips) chip.tabIndex = chip === (chosen ?? chips[0]) ? 0 : -1;
  }

  function filter(name) {
    let count = 0;
    for (const card of cards) {
      card.hidden = name !== "" && !JSON.parse(card.dataset.classes).includes(name);
      count += card.hidden ? 0 : 1;
    }
    for (const chip of chips) chip.setAttribute("aria-pressed", String(chip.dataset.class === name));
    stop();
    shown.textContent = `${count} of ${cards.length} images`;
  }

  for (const chip of chips) {
    chip.addEventListener("click", () => {
      const again = chip.getAttribute("aria-pressed") === "true";
      filter(again ? "" : chip.dataset.class);
    });
  }
  filter("");
  rove(document.querySelector(".chips"), ".chip");
  document.querySelector(".toolbar .find")?.addEventListener("found", stop);

  const given = (a, b) => a.dataset.index - b.dataset.index;
  const score = (card) => (card.dataset.miou === "" ? NaN : Number(card.dataset.miou));
  // Cards without a score come last in either order.
  const by = (sign) => (a, b) =>
    Number.isNaN(score(a)) - Number.isNaN(score(b)) ||
    sign * (score(a) - score(b)) ||
    given(a, b);
  const kinds = ["typical", "worst", "best", ""];
  const kind = (a, b) => kinds.indexOf(a.dataset.kind) - kinds.indexOf(b.dataset.kind) || given(a, b);
  const orders = { kind, given, worst: by(1), best: by(-1) };

  const sort = document.getElementById("sort");
  const place = () => cards[0].parentElement.append(...[...cards].sort(orders[sort.value]));
  sort.addEventListener("change", place);

  for (const radio of document.querySelectorAll("input[name=side]")) {
    radio.addEventListener("change", () => {
      for (const card of cards) {
        choose(card, card.querySelector(`.thumb[data-what="${radio.value}"]`));
      }
    });
  }
})();

// Search fields: what has the text in its name stays.
(() => {
  for (const field of document.querySelectorAll("input[data-finds]")) {
    const all = [...document.querySelectorAll(field.dataset.finds)];
    const names = all.map((one) => (one.querySelector(".name") ?? one).textContent.toLowerCase());
    field.addEventListener("input", () => {
      const wanted = field.value.trim().toLowerCase();
      all.forEach((one, i) => {
        one.hidden = !names[i].includes(wanted);
      });
      field.dispatchEvent(new Event("found"));
    });
  }
})();

// Curves: the value under the pointer.
(() => {
  for (const plot of document.querySelectorAll(".plot")) {
    const points = JSON.parse(plot.dataset.points);
    const probe = plot.querySelector(".probe");
    const readout = plot.parentElement.querySelector(".readout");
    const line = probe.querySelector("line");
    const circle = probe.querySelector("circle");
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * plot.viewBox.baseVal.width;
      const near = points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
      line.setAttribute("x1", near[0]);
      line.setAttribute("x2", near[0]);
      circle.setAttribute("cx", near[0]);
      circle.setAttribute("cy", near[1]);
      probe.removeAttribute("hidden");
      readout.textContent = near[2];
    });
    plot.addEventListener("pointerleave", () => {
      probe.setAttribute("hidden", "");
      readout.textContent = "";
    });
  }
})();
