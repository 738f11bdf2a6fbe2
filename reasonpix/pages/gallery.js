// Searches, filters, sorts and pages the records. The state is in the URL's hash, so that a view can
// be bookmarked: controls change the hash, and a change of the hash renders the page.
"use strict";

const PAGE_SIZE = 60;
const { scores, records } = JSON.parse(document.getElementById("index").textContent);
// Templates are inert: their images are neither decoded nor laid out until a card is shown.
const templates = document.querySelectorAll("#all > template");
const form = document.querySelector("form.controls");
const fields = [...form.elements].filter((field) => field.name);
const cards = document.getElementById("cards");
const number = new Intl.NumberFormat("en-US");
let waiting = null;  // the timer of a change that is not in the hash yet
const plain = (text) => text.normalize("NFKC").toLowerCase();

records.forEach((record, place) => {
  record.place = place;
  record.text = plain(record.text);
});

function readState() {
  const hash = location.hash.slice(1);
  // A hash without a field is a record id, as in gallery.html#4f1c0a.
  if (hash && !hash.includes("=")) return new URLSearchParams({ q: decodeURIComponent(hash) });
  return new URLSearchParams(hash);
}

function matching(state) {
  const words = plain(state.get("q") ?? "").split(/\s+/).filter(Boolean);
  const chosen = ["outcome", "kind", "category", "target"].filter((name) => state.get(name));
  return records.filter((record) =>
    chosen.every((name) => String(record[name]) === state.get(name)) &&
    words.every((word) => record.text.includes(word)));
}

function sorted(found, state) {
  const by = state.get("sort");
  const sign = state.get("order") === "descending" ? -1 : 1;
  if (!by) return sign > 0 ? found : found.reverse();
  const column = scores.indexOf(by);
  const key = column < 0 ? (record) => record.id : (record) => record.scores[column];
  return found.sort((one, other) => {
    const [a, b] = [key(one), key(other)];
    if (a === null || b === null) return (a === null) - (b === null) || one.place - other.place;
    return sign * ((a > b) - (a < b)) || one.place - other.place;  // without a score: last
  });
}

function render() {
  const state = readState();
  if (!waiting) for (const field of fields) field.value = state.get(field.name) ?? "";
  const found = sorted(matching(state), state);
  const pages = Math.max(1, Math.ceil(found.length / PAGE_SIZE));
  const page = Math.min(pages, Math.max(1, Number.parseInt(state.get("page"), 10) || 1));
  const from = (page - 1) * PAGE_SIZE;
  const shown = found.slice(from, from + PAGE_SIZE);
  cards.replaceChildren(...shown.map((record) => templates[record.place].content.cloneNode(true)));
  const range = shown.length ? `, ${number.format(from + 1)}–${number.format(from + shown.length)} shown` : "";
  document.getElementById("count").textContent =
    `${number.format(found.length)} of ${number.format(records.length)} records match${range}`;
  for (const nav of document.querySelectorAll("nav.pages")) {
    nav.hidden = pages === 1;
    nav.querySelector("span").textContent = `page ${number.format(page)} of ${number.format(pages)}`;
    for (const button of nav.querySelectorAll("button")) {
      const target = page + Number(button.dataset.step);
      button.disabled = target < 1 || target > pages;
    }
  }
}

function hashOf(state) {
  for (const [name, value] of [...state]) if (!value) state.delete(name);
  return `#${state.size ? state : "page=1"}`;  // an empty hash would scroll to the top
}

function turn(step) {
  const state = readState();
  const page = (Number.parseInt(state.get("page"), 10) || 1) + step;
  state.set("page", page > 1 ? page : "");
  location.hash = hashOf(state);  // with an entry in the history
  document.getElementById("records").scrollIntoView();
}

function follow(state) {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    waiting = null;
    location.replace(hashOf(state));
  }, 100);
}

form.addEventListener("input", () => follow(new URLSearchParams(new FormData(form))));
form.addEventListener("reset", () => follow(new URLSearchParams()));
form.addEventListener("submit", (event) => event.preventDefault());
for (const button of document.querySelectorAll("nav.pages button")) {
  button.addEventListener("click", () => turn(Number(button.dataset.step)));
}
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select")) return;
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const button = step && document.querySelector(`nav.pages button[data-step="${step}"]`);
  if (button && !button.disabled) turn(step);
  if (event.key === "/") {
    event.preventDefault();
    form.elements.q.focus();
  }
});
addEventListener("hashchange", () => {
  render();
  if (readState().has("kind") && !form.contains(document.activeElement)) {
    document.getElementById("records").scrollIntoView();
  }
});
render();
