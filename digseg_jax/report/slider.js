"use strict";

// The slider of a card: input on the left, one of the small images on the right. On a stage with
// data-points a press without a movement is a click on a pixel and does not move the line.
window.slider = (() => {
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
      other.tabIndex = other === thumb ? 0 : -1;
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

  // One stop of the Tab key for many buttons: arrow keys move between them.
  function rove(group, selector) {
    group.addEventListener("keydown", (event) => {
      const all = [...group.querySelectorAll(selector)].filter((one) => !one.hidden);
      const now = all.indexOf(event.target.closest(selector));
      const steps = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, Home: -now, End: all.length };
      if (now < 0 || !(event.key in steps) || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      const next = all[Math.min(all.length - 1, Math.max(0, now + steps[event.key]))];
      for (const one of all) one.tabIndex = one === next ? 0 : -1;
      next.focus();
    });
  }

  function wire(card) {
    const stage = card.querySelector(".stage");
    const handle = card.querySelector(".handle");
    let from = null; // where a press began that may still be a click (data-points)
    const follow = (event) => {
      const box = stage.getBoundingClientRect();
      moveTo(card, (100 * (event.clientX - box.left)) / box.width);
    };
    stage.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      event.preventDefault();
      stage.setPointerCapture(event.pointerId);
      handle.focus({ preventScroll: true, focusVisible: false });
      from = "points" in stage.dataset && event.target.closest(".handle") === null ? event.clientX : null;
      if (from === null) follow(event);
    });
    stage.addEventListener("pointermove", (event) => {
      if (!stage.hasPointerCapture(event.pointerId)) return;
      if (from !== null && Math.abs(event.clientX - from) < 5) return;
      from = null;
      follow(event);
    });
    handle.addEventListener("keydown", (event) => {
      const value = keyStep(event, position(card));
      if (value === null || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      moveTo(card, value);
    });
    for (const thumb of card.querySelectorAll(".thumb")) {
      thumb.tabIndex = thumb.getAttribute("aria-pressed") === "true" ? 0 : -1;
    }
    rove(card, ".thumb");
    // Thumbnails may come later: listen on the card.
    card.addEventListener("click", (event) => {
      const thumb = event.target.closest(".thumb");
      if (thumb) choose(card, thumb);
    });
  }

  return { wire, choose, moveTo, rove };
})();
