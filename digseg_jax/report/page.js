"use strict";

// Gallery: a slider on each card, the choice of its right side, filter and order.
(() => {
  const cards = [...document.querySelectorAll(".card")];
  if (!cards.length) return;

  const clamp = (value) => Math.min(100, Math.max(0, value));

  function moveTo(card, value) {
    const stage = card.querySelector(".stage");
    const handle = card.querySelector(".handle");
    const share = Math.round(clamp(value));
    const right = card.querySelector(".tag.right").textContent;
    stage.style.setProperty("--x", `${share}%`);
    handle.setAttribute("aria-valuenow", String(share));
    handle.setAttribute("aria-valuetext", `${share} % input, ${100 - share} % ${right}`);
    card.querySelector(".tag.left").classList.toggle("away", share < 15);
    card.querySelector(".tag.right").classList.toggle("away", share > 85);
  }

  const position = (card) => Number(card.querySelector(".handle").getAttribute("aria-valuenow"));

  function choose(card, thumb) {
    const small = thumb.querySelector("img");
    const shown = card.querySelector(".layer img");
    shown.src = small.src;
    shown.alt = small.alt;
    shown.className = small.className;
    const tint = thumb.querySelector(".pic").style.getPropertyValue("--tint");
    shown.parentElement.style.setProperty("--tint", tint);
    card.querySelector(".tag.right").textContent = thumb.dataset.what;
    for (const other of card.querySelectorAll(".thumb")) {
      other.setAttribute("aria-pressed", String(other === thumb));
    }
    moveTo(card, position(card));
  }

  function keyStep(event, now) {
    const small = event.shiftKey ? 10 : 2;
    switch (event.key) {
      case "ArrowLeft":
      case "ArrowDown":
        return now - small;
      case "ArrowRight":
      case "ArrowUp":
        return now + small;
      case "PageDown":
        return now - 10;
      case "PageUp":
        return now + 10;
      case "Home":
        return 0;
      case "End":
        return 100;
      default:
        return null;
    }
  }

  function wire(card) {
    const stage = card.querySelector(".stage");
    const handle = card.querySelector(".handle");
    const follow = (event) => {
      const box = stage.getBoundingClientRect();
      moveTo(card, (100 * (event.clientX - box.left)) / box.width);
    };
    stage.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      event.preventDefault();
      stage.setPointerCapture(event.pointerId);
      handle.focus({ preventScroll: true, focusVisible: false });
      follow(event);
    });
    stage.addEventListener("pointermove", (event) => {
      if (stage.hasPointerCapture(event.pointerId)) follow(event);
    });
    handle.addEventListener("keydown", (event) => {
      const value = keyStep(event, position(card));
      if (value === null || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      moveTo(card, value);
    });
    for (const thumb of card.querySelectorAll(".thumb")) {
      thumb.addEventListener("click", () => choose(card, thumb));
    }
  }

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

  const chips = [...document.querySelectorAll(".chip")];
  const shown = document.getElementById("shown");

  function filter(name) {
    let count = 0;
    for (const card of cards) {
      card.hidden = name !== "" && !JSON.parse(card.dataset.classes).includes(name);
      count += card.hidden ? 0 : 1;
    }
    for (const chip of chips) {
      chip.setAttribute("aria-pressed", String(chip.dataset.class === name));
    }
    shown.textContent = `${count} of ${cards.length} images`;
  }

  for (const chip of chips) {
    chip.addEventListener("click", () => {
      const again = chip.getAttribute("aria-pressed") === "true";
      filter(again ? "" : chip.dataset.class);
    });
  }
  filter("");

  const given = (a, b) => a.dataset.index - b.dataset.index;
  const score = (card) => (card.dataset.miou === "" ? NaN : Number(card.dataset.miou));
  // Cards without a score come last in either order.
  const by = (sign) => (a, b) =>
    Number.isNaN(score(a)) - Number.isNaN(score(b)) ||
    sign * (score(a) - score(b)) ||
    given(a, b);
  const orders = { given, worst: by(1), best: by(-1) };

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
