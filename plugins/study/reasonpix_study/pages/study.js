"use strict";
// Keys 1 to 9 choose, Enter confirms; how long the page was looked at is sent along.
const form = document.querySelector("form");
const button = form.querySelector("button");
const place = `${location.pathname}#${form.elements.number.value}`;

const picture = form.querySelector("img");
form.style.setProperty("--ratio", picture.getAttribute("width") / picture.getAttribute("height"));

// Kept over a reload. Where storage is forbidden, what came before the reload is not counted.
const stored = {
  get: () => { try { return Number(sessionStorage.getItem(place)); } catch { return 0; } },
  set: (value) => { try { sessionStorage.setItem(place, value); } catch { /* see above */ } },
};
const before = stored.get();
let seen = 0;
let since = document.hidden ? null : performance.now();

function pause() {
  if (since !== null) seen += (performance.now() - since) / 1000;
  since = null;
  stored.set(before + seen);
}

document.addEventListener("visibilitychange", () => {
  pause();
  if (!document.hidden) since = performance.now();
});
addEventListener("pagehide", pause);

form.addEventListener("formdata", (event) => {
  pause();
  event.formData.set("seconds", (before + seen).toFixed(2));
});
form.addEventListener("submit", () => { button.disabled = true; });
addEventListener("pageshow", (event) => {
  button.disabled = false;
  if (event.persisted) since = performance.now();
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  const choice = form.querySelector(`[name=position][value="${CSS.escape(event.key)}"]`);
  if (choice) {
    choice.checked = true;
    choice.focus({ preventScroll: true });
  } else if (event.key === "Enter") {
    event.preventDefault();
    if (!button.disabled) form.requestSubmit();
  }
});
