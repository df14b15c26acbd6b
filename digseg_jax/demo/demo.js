"use strict";

// The demo: sends an image and words to the server, and shows the masks while they are made.
(() => {
  const $ = (id) => document.getElementById(id);
  const facts = JSON.parse($("facts").textContent);
  const card = $("card");
  const stage = card.querySelector(".stage");
  const { wire, choose, moveTo } = window.slider;
  let image = null; // a File, or the name of a sample
  let job = null; // the latest state that the server told
  let canceling = false;

  // The form as the model wants it.
  $("words").value = facts.words.join("\n");
  $("words").readOnly = facts.closed;
  $("members").value = facts.members;
  $("steps").value = facts.steps;
  const vocabularies = { "this model": facts.classes, ...facts.vocabularies };
  for (const name of Object.keys(vocabularies)) $("vocabulary").add(new Option(name));
  $("vocabulary-field").hidden = facts.closed;
  $("vocabulary").addEventListener("change", () => {
    const words = vocabularies[$("vocabulary").value];
    if (words) $("words").value = words.join("\n");
  });

  function say(text, isError = false) {
    $("status").textContent = text;
    $("status").classList.toggle("error", isError);
  }

  // Choice of the image: a file, a dropped file, or a sample. Words that nobody has edited follow it.
  const first = facts.words.join("\n");
  const wordsOf = (sample) => (facts.samples[sample] ?? []).join("\n") || first;
  const unedited = [first, ...Object.keys(facts.samples).map(wordsOf)];
  function take(chosen, text) {
    image = chosen;
    if (unedited.includes($("words").value)) {
      $("words").value = chosen instanceof File ? first : wordsOf(chosen);
    }
    $("chosen").textContent = text;
    for (const button of document.querySelectorAll(".sample")) {
      button.setAttribute("aria-pressed", String(button.dataset.sample === chosen));
    }
  }
  $("file").addEventListener("change", () => {
    const [file] = $("file").files;
    if (file) take(file, file.name);
  });
  for (const button of document.querySelectorAll(".sample")) {
    button.addEventListener("click", () => {
      $("file").value = "";
      take(button.dataset.sample, `sample: ${button.textContent}`);
    });
  }
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return; // text may go into the words
      event.preventDefault();
      $("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover");
      const [file] = kind === "drop" ? event.dataTransfer.files : [];
      if (file) take(file, file.name);
    });
  }

  async function ask(address, options = {}) {
    const reply = await fetch(address, options);
    const value = await reply.json().catch(() => ({ error: `not understood (${reply.status})` }));
    if (!reply.ok) throw new Error(value.error);
    return value;
  }

  // One order: sent, then followed until it ends.
  async function send() {
    if (image === null) throw new Error("choose an image first");
    const words = $("words").value.split("\n").map((word) => word.trim()).filter(Boolean);
    const query = new URLSearchParams(words.map((word) => ["word", word]));
    for (const name of ["members", "steps", "side"]) query.set(name, $(name).value);
    const isFile = image instanceof File;
    if (isFile && image.size > facts.most) {
      throw new Error(`the file has more than ${facts.most / 2 ** 20} MiB`);
    }
    query.set(isFile ? "name" : "sample", isFile ? image.name : image);
    return ask(`jobs?${query}`, { method: "POST", body: isFile ? image : "" });
  }

  const running = () => job !== null && (job.state === "queued" || job.state === "running");

  // A server that does not answer at once, say after the computer has slept, is asked again.
  async function stateOf(id) {
    for (let tries = 1; ; tries++) {
      try {
        return await ask(`jobs/${id}`);
      } catch (error) {
        if (!(error instanceof TypeError) || tries === 5) throw error;
        await new Promise((resolve) => setTimeout(resolve, 1000));
      }
    }
  }

  async function follow() {
    while (running()) {
      tell();
      await new Promise((resolve) => setTimeout(resolve, 200));
      const before = job.version;
      job = await stateOf(job.id);
      if (job.version !== before) showMasks();
    }
    if (job.state === "failed") throw new Error(job.error);
    say(job.state === "done" ? "Done." : "Canceled.");
    for (const link of $("files").querySelectorAll("a")) {
      link.href = `jobs/${job.id}/files/${link.dataset.what}`;
    }
    $("files").hidden = job.state !== "done";
  }

  function tell() {
    $("progress").hidden = false;
    $("progress").value = job.total ? job.done / job.total : 0;
    if (canceling) say("Canceling …");
    else if (job.state === "queued") say(`Waiting: number ${job.place} in the queue.`);
    else if (!job.total) say("Working …");
    else {
      const where = `member ${job.member} of ${job.members}, step ${job.step} of ${job.steps}`;
      say(`Working: ${where} (${job.done}/${job.total})`);
    }
  }

  $("ask").addEventListener("submit", async (event) => {
    event.preventDefault();
    if (running()) return;
    $("go").disabled = true;
    canceling = false;
    say("Sending …");
    try {
      job = await send();
      $("cancel").hidden = false;
      showInput();
      await follow();
    } catch (error) {
      // An order that was refused leaves the one that is shown; one that was lost has ended.
      say(error.message, true);
      if (running()) job.state = "failed";
    }
    $("go").disabled = false;
    $("cancel").hidden = true;
    $("progress").hidden = true;
  });
  $("cancel").addEventListener("click", async () => {
    try {
      canceling = true;
      say("Canceling …");
      await ask(`jobs/${job.id}/cancel`, { method: "POST", body: "" });
    } catch (error) {
      canceling = false;
      say(error.message, true);
    }
  });

  // Nobody could cancel the order of a page that is gone, and others would wait for it.
  window.addEventListener("pagehide", () => {
    if (running()) fetch(`jobs/${job.id}/cancel`, { method: "POST", body: "", keepalive: true });
  });

  // The card: input, then one small image of all words and one of each.
  function showInput() {
    card.hidden = false;
    stage.style.aspectRatio = `${job.width}/${job.height}`;
    stage.style.width = `min(100%, 72vh * ${job.width / job.height})`;
    stage.querySelector(".photo").src = `jobs/${job.id}/input.png`;
    stage.querySelector(".layer img").removeAttribute("src");
    $("x").max = job.width - 1;
    $("y").max = job.height - 1;
    $("files").hidden = true;
    $("pixel").replaceChildren();
    stage.querySelector(".mark")?.remove();
    const all = thumb("all words", "labels", "", "");
    const each = job.words.map(({ word, color }) => thumb(`mask of “${word}”`, "mask", word, color));
    $("thumbs").replaceChildren(all, ...each);
    choose(card, all);
    moveTo(card, 50);
  }

  function thumb(what, kind, word, color) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "thumb";
    button.dataset.what = what;
    button.innerHTML = '<span class="pic"><img alt=""></span><span class="caption"><span class="word"></span></span>';
    button.querySelector("img").className = kind;
    button.querySelector(".pic").style.setProperty("--tint", color || "#ffffff");
    button.querySelector(".pic").style.aspectRatio = `${job.width}/${job.height}`;
    const name = button.querySelector(".word");
    if (color) name.append(dot(color));
    name.append(word || "all words");
    button.querySelector(".caption").append(document.createElement("data"));
    return button;
  }

  function dot(color) {
    const mark = document.createElement("span");
    mark.className = "dot";
    mark.style.background = color;
    return mark;
  }

  function showMasks() {
    const [all, ...each] = $("thumbs").children;
    all.querySelector("img").src = `jobs/${job.id}/labels.png?${job.version}`;
    each.forEach((button, place) => {
      button.querySelector("img").src = `jobs/${job.id}/mask/${place}.png?${job.version}`;
      button.querySelector("data").textContent = `${(100 * job.words[place].share).toFixed(1)} %`;
    });
    const shown = $("thumbs").querySelector('[aria-pressed="true"] img');
    stage.querySelector(".layer img").src = shown.src;
    if (stage.querySelector(".mark")) showPixel();
  }

  $("opacity").addEventListener("input", () => {
    stage.style.setProperty("--opacity", String($("opacity").value / 100));
  });

  // The words of a place: by a click, or by its column and row.
  async function showPixel() {
    if (job === null) return;
    const [x, y] = [Number($("x").value), Number($("y").value)];
    let mark = stage.querySelector(".mark");
    if (!mark) {
      mark = document.createElement("span");
      mark.className = "mark";
      stage.append(mark);
    }
    mark.style.left = `${(100 * (x + 0.5)) / job.width}%`;
    mark.style.top = `${(100 * (y + 0.5)) / job.height}%`;
    if (job.version === 0) return;
    try {
      const found = await ask(`jobs/${job.id}/pixel?x=${x}&y=${y}`);
      const colors = new Map(job.words.map(({ word, color }) => [word, color]));
      $("pixel").replaceChildren(...found.words.map((row) => bar(row, colors.get(row.word))));
    } catch (error) {
      say(error.message, true);
    }
  }

  function bar({ word, probability }, color) {
    const line = document.createElement("li");
    line.innerHTML = '<span class="name"></span><span class="track" aria-hidden="true"><span class="fill"></span></span><span class="value"></span>';
    line.querySelector(".name").textContent = word;
    line.querySelector(".fill").style.width = `${100 * probability}%`;
    line.querySelector(".fill").style.background = color;
    line.querySelector(".value").textContent = probability.toFixed(3);
    return line;
  }

  stage.dataset.points = "";
  wire(card);
  let pressed = null;
  stage.addEventListener("pointerdown", (event) => {
    pressed = [event.clientX, event.clientY];
  });
  stage.addEventListener("click", (event) => {
    if (job === null || !pressed || event.target.closest(".handle")) return;
    if (Math.hypot(event.clientX - pressed[0], event.clientY - pressed[1]) > 4) return;
    const box = stage.getBoundingClientRect();
    const place = (share, size) => Math.min(size - 1, Math.max(0, Math.floor(share * size)));
    $("x").value = place((event.clientX - box.left) / box.width, job.width);
    $("y").value = place((event.clientY - box.top) / box.height, job.height);
    showPixel();
  });
  for (const id of ["x", "y"]) $(id).addEventListener("change", showPixel);
})();
