// Runs demo.js on a page of stand-ins and prints what happened: node without_browser.js demo.js
"use strict";

const fs = require("fs");

// An element that takes everything, and keeps its listeners and what it finds.
function element() {
  const listeners = {};
  const found = {};
  const made = {
    value: "", textContent: "", hidden: false, disabled: false, href: "", src: "", innerHTML: "",
    dataset: {}, files: [], children: [],
    style: { setProperty() {} },
    classList: { toggle() {} },
    querySelector: (selector) => (found[selector] ??= element()),
    querySelectorAll: () => [],
    addEventListener: (kind, listener) => (listeners[kind] ??= []).push(listener),
    setAttribute() {}, removeAttribute() {}, append() {}, remove() {}, add() {},
    replaceChildren: (...children) => { made.children = children; },
    closest: () => null,
    getBoundingClientRect: () => ({ left: 0, top: 0, width: 40, height: 20 }),
    fire: async (kind, event = {}) => {
      for (const listener of listeners[kind] ?? []) await listener({ preventDefault() {}, ...event });
    },
  };
  return made;
}

const elements = {};
const byId = (id) => (elements[id] ??= element());
const facts = { classes: ["water"], words: ["water"], samples: {}, closed: false, members: 1, steps: 1, most: 1e6, vocabularies: {} };
byId("facts").textContent = JSON.stringify(facts);
globalThis.document = Object.assign(element(), { getElementById: byId, createElement: element });
globalThis.window = Object.assign(element(), { slider: { wire() {}, choose() {}, moveTo() {} } });
globalThis.Option = function () {};
globalThis.File = class { constructor(name) { this.name = name; this.size = 1; } };

// The server: answers in turn, and remembers what it was asked.
const asked = [];
const answers = [];
globalThis.fetch = async (address) => {
  asked.push(address);
  const { ok = true, value, gone } = answers.shift();
  if (gone) throw new Error("gone");
  return { ok, status: ok ? 200 : 400, json: async () => value };
};
const job = { id: "one", state: "done", version: 1, width: 40, height: 20, words: [{ word: "water", color: "#00f", share: 0.5 }] };
const pixel = { value: { words: [{ word: "water", probability: 0.25 }] } };

async function click(stage) {
  const at = { clientX: 10, clientY: 5, target: stage };
  await stage.fire("pointerdown", at);
  await stage.fire("click", at);
}

async function main() {
  const told = {};
  eval(fs.readFileSync(process.argv[2], "utf-8"));
  const stage = byId("card").querySelector(".stage");
  const settle = () => new Promise((resolve) => setTimeout(resolve, 20));

  // A click before there is anything.
  await click(stage);
  told.before = [...asked];

  // Text that is dropped goes into the words; a file is taken.
  let prevented = 0;
  const drop = (types, files) =>
    document.fire("drop", { dataTransfer: { types, files }, preventDefault: () => { prevented += 1; } });
  await drop(["text/plain"], []);
  told.textPrevented = prevented;
  await drop(["Files"], [new File("photo of a leaf.png")]);
  told.filePrevented = prevented;
  told.chosen = byId("chosen").textContent;

  // An order, then one that is refused: the first is still shown.
  answers.push({ value: job });
  await byId("ask").fire("submit");
  told.first = byId("status").textContent;
  told.name = new URLSearchParams(asked.at(-1).split("?")[1]).get("name");
  answers.push({ ok: false, value: { error: "8 images are waiting already" } });
  await byId("ask").fire("submit");
  told.refused = byId("status").textContent;
  answers.push(pixel);
  await click(stage);
  await settle();
  told.clicked = asked.at(-1);
  byId("x").value = "7";
  answers.push(pixel);
  await byId("x").fire("change");
  told.column = asked.at(-1);
  told.rows = byId("pixel").children.length;

  // An order that is lost on its way does not block the next one.
  answers.push({ value: { ...job, id: "two", state: "running" } }, { gone: true });
  await byId("ask").fire("submit");
  told.lost = byId("status").textContent;
  answers.push({ value: { ...job, id: "three" } });
  await byId("ask").fire("submit");
  told.third = byId("status").textContent;
  console.log(JSON.stringify(told));
}

main().catch((error) => { console.error(error); process.exit(1); });
