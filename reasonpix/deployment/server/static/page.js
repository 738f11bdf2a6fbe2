// The page of `reasonpix serve`. It uses the server's REST API, by relative URLs only, so that it
// works behind any path prefix. Text from users and the server is only ever set as textContent.

const HISTORY_LENGTH = 30;
const RETRIES = 10;
const THUMBNAIL_PX = 320;
const FIELD_LABELS = {
  image: "Image", instruction: "Instruction", seed: "Seed", steps: "Steps", resolution: "Resolution",
  guidance_scale: "Guidance", image_guidance_scale: "Image guidance",
};
const STATUS_TEXTS = {
  401: "The token is missing or wrong.",
  413: "The image is too large for this server.",
  429: "The server is busy with other edits",
  502: "The server cannot be reached: is it running?",
  503: "The server is not ready",
  504: "The edit took too long; ask for fewer steps, or try again later.",
};

const get = (id) => document.getElementById(id);
const seconds = (count) => new Promise((resolve) => { setTimeout(resolve, 1000 * count); });

/** Storage may be forbidden; then nothing outlives a reload. */
function stored(storage, key, ...value) {
  try {
    if (!value.length) return window[storage].getItem(key);
    if (value[0] === null) window[storage].removeItem(key);
    else window[storage].setItem(key, value[0]);
  } catch { /* see above */ }
  return null;
}

// -- the API -------------------------------------------------------------------------------------

class ApiError extends Error {
  constructor(message, status = 0, retryAfter = 0) {
    super(message);
    Object.assign(this, { status, retryAfter });
  }
}

// By path, so that it is not sent to another server that a proxy shows at the same origin.
const tokenKey = `reasonpix-token:${location.pathname}`;
let token = stored("sessionStorage", tokenKey);

/** Call the API. Rejects with an ApiError in plain words, or with an AbortError. */
async function call(path, options = {}) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached: is it running, and are you online?");
  }
  if (response.ok) return response;
  throw new ApiError(await explain(response), response.status, retryAfter(response));
}

async function explain(response) {
  const { status } = response;
  let detail = "";
  try {
    detail = String((await response.json()).detail ?? "");
  } catch { /* not from our server but, for example, a proxy's page */ }
  if (status === 401 || status === 429 || !detail) {
    return STATUS_TEXTS[status] ?? `The server answered with status ${status}.`;
  }
  const labelled = detail
    .replace(/; try again in \d+ s$/, "")
    .replace(/^'?(\w+)'?(?=:? )/gm, (word, name) => FIELD_LABELS[name] ?? word);
  return labelled[0].toUpperCase() + labelled.slice(1);
}

/** Seconds to wait before the next try; 0 where trying again would not help. */
function retryAfter(response) {
  if (response.status !== 429 && response.status !== 503) return 0;
  return Math.max(1, parseInt(response.headers.get("Retry-After"), 10) || 1);
}

// -- start, and the token ------------------------------------------------------------------------

let model = null;

async function connect() {
  get("main").hidden = get("login").hidden = true;
  get("startup").hidden = false;
  for (;;) {
    try {
      const answer = await (await call("v1/model")).json();
      if (!model) applyModel(answer);
      model = answer;
      break;
    } catch (error) {
      if (error.status === 401) {
        askForToken();
        return;
      }
      const wait = error.retryAfter || 5;
      get("startup").textContent = `${error.message.replace(/[.]$/, "")}. Trying again in ${wait} s.`;
      await seconds(wait);
    }
  }
  get("startup").hidden = true;
  get("main").hidden = false;
}

function askForToken() {
  get("startup").hidden = get("main").hidden = true;
  get("login").hidden = false;
  show(get("login-error"), token === null ? "" : "This token is wrong.");
  token = null;
  stored("sessionStorage", tokenKey, null);
  get("token").select();
}

get("login").addEventListener("submit", (event) => {
  event.preventDefault();
  const typed = get("token").value.trim();
  if (!/^[!-~]+$/.test(typed)) {
    show(get("login-error"), "A token has letters, digits and signs only.");
    return;
  }
  token = typed;
  stored("sessionStorage", tokenKey, token);
  get("token").value = "";
  connect();
});

// -- settings ------------------------------------------------------------------------------------

/** The number input of each setting holds its value; the slider follows it. */
const settings = Object.fromEntries(
  [...document.querySelectorAll("[data-name]")].map((row) => {
    const [number, range] = row.querySelectorAll("input");
    range.step = row.dataset.step;
    number.step = row.dataset.step === "1" ? "1" : "any";
    range.addEventListener("input", () => { number.value = range.value; });
    number.addEventListener("input", () => { range.value = number.value; });
    return [row.dataset.name, { number, range }];
  }),
);
const seed = get("seed");

function setSetting(name, value) {
  const { number, range } = settings[name];
  number.value = range.value = value;
}

function applyModel({ name, runtime, device, settings: defaults, limits }) {
  document.title = `${name} – reasonpix`;
  get("title").textContent = name;
  get("runtime").textContent = `${runtime} on ${device}`;
  const bounds = {
    guidance_scale: [0, Math.max(20, 2 * defaults.guidance_scale)],
    image_guidance_scale: [0, Math.max(5, 2 * defaults.image_guidance_scale)],
    steps: [1, limits.max_steps],
    resolution: [8, limits.max_resolution],
  };
  for (const [setting, [min, max]] of Object.entries(bounds)) {
    const { number, range } = settings[setting];
    Object.assign(range, { min, max });
    number.min = min;
    if (setting in { steps: 0, resolution: 0 }) number.max = max; // the server has no other limits
  }
  applyDefaults(defaults);
}

function applyDefaults(defaults) {
  for (const name of ["guidance_scale", "image_guidance_scale", "resolution"]) {
    setSetting(name, defaults[name]);
  }
  setSetting("steps", defaults.num_inference_steps);
}

get("reset").addEventListener("click", () => applyDefaults(model.settings));
get("random").addEventListener("click", () => {
  seed.value = crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
});

// -- the image -----------------------------------------------------------------------------------

/** The image to edit: a Blob and its name. */
let input = null;

function setInput(blob, name) {
  if (!blob) return;
  showError("");
  if (blob.type && !blob.type.startsWith("image/")) {
    showError(`${name} is not an image.`);
    return;
  }
  const { max_bytes: limit } = model.limits;
  if (blob.size > limit) {
    showError(`${name} has ${megabytes(blob.size)}; this server takes images of up to ${megabytes(limit)}.`);
    return;
  }
  input = { blob, name };
  const preview = get("preview");
  URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(blob);
  preview.hidden = false;
  get("image-text").hidden = true;
  get("file-name").textContent = `${name} · click, drop or paste to replace it`;
}

const megabytes = (bytes) => `${(bytes / 2 ** 20).toFixed(bytes < 2 ** 20 ? 2 : 1)} MB`;

get("preview").addEventListener("error", () => { // a TIFF, for example, which the server can read
  get("preview").hidden = true;
  get("image-text").hidden = false;
  get("file-name").textContent = `${input.name} · your browser cannot show it; the server may still read it`;
});

get("file").addEventListener("change", ({ target }) => {
  const [file] = target.files;
  if (file) setInput(file, file.name);
  target.value = ""; // or choosing the same file again would be no change
});

document.addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  if (!file || !model) return;
  event.preventDefault();
  setInput(file, file.name);
});

for (const type of ["dragenter", "dragover"]) {
  document.addEventListener(type, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    get("drop-overlay").hidden = get("main").hidden;
  });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) get("drop-overlay").hidden = true;
});
document.addEventListener("drop", (event) => {
  get("drop-overlay").hidden = true;
  const [file] = event.dataTransfer.files;
  if (!file) return;
  event.preventDefault();
  if (model) setInput(file, file.name);
});

// -- an edit -------------------------------------------------------------------------------------

/** The AbortController of the edit under way. */
let running = null;

/** The fields of the form, or null after saying what is wrong. */
function readForm() {
  if (!input) return refuse("Choose an image first.", get("file"));
  const instruction = get("instruction").value.trim();
  if (!instruction) return refuse("Write what should change.", get("instruction"));
  const numbers = { seed, ...Object.fromEntries(Object.entries(settings).map(([name, { number }]) => [name, number])) };
  for (const [name, number] of Object.entries(numbers)) {
    if (number.value && number.validity.valid) continue;
    get("settings").open = true;
    const whole = number.step === "1" ? "a whole number" : "a number";
    const range = number.max ? `from ${number.min} to ${number.max}` : `of at least ${number.min}`;
    return refuse(`${FIELD_LABELS[name]}: enter ${whole} ${range}.`, number);
  }
  const values = Object.fromEntries(Object.entries(numbers).map(([name, number]) => [name, number.value]));
  return { input, instruction, values };
}

function refuse(message, element) {
  showError(message);
  element.focus();
  return null;
}

get("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (running) return;
  showError("");
  const edit = readForm();
  if (!edit) return;
  running = new AbortController();
  const stopClock = startClock();
  try {
    addToHistory({ ...edit, result: await requestEdit(edit, running.signal) });
    get("announcement").textContent = "The edit is done.";
    get("result").scrollIntoView({ block: "nearest" });
  } catch (error) {
    if (error.name === "AbortError") get("announcement").textContent = "The edit was cancelled.";
    else if (error.status === 401) askForToken();
    else showError(error.message);
  } finally {
    running = null;
    stopClock();
  }
});

/** The edited image. While the server is busy, the request is repeated when the server says. */
async function requestEdit({ input: { blob }, instruction, values }, signal) {
  for (let tries = 1; ; tries += 1) {
    const form = new FormData();
    form.append("image", blob, "image");
    form.append("instruction", instruction);
    for (const [name, value] of Object.entries(values)) form.append(name, value);
    try {
      setState("Editing…");
      return await (await call("v1/edits", { method: "POST", body: form, signal })).blob();
    } catch (error) {
      if (!error.retryAfter || tries === RETRIES) throw error;
      for (let left = error.retryAfter; left > 0; left -= 1) {
        setState(`${error.message}. Trying again in ${left} s.`);
        await seconds(1);
        signal.throwIfAborted();
      }
    }
  }
}

function startClock() {
  const start = performance.now();
  const tick = () => { get("elapsed").textContent = `${Math.floor((performance.now() - start) / 1000)} s`; };
  tick();
  const timer = setInterval(tick, 1000);
  get("edit").setAttribute("aria-disabled", "true");
  get("state").hidden = false;
  get("empty").hidden = true;
  get("announcement").textContent = "Editing.";
  get("state").scrollIntoView({ block: "nearest" });
  return () => {
    clearInterval(timer);
    get("edit").removeAttribute("aria-disabled");
    if (document.activeElement === get("cancel")) get("edit").focus();
    get("state").hidden = true;
    get("empty").hidden = shownEdit !== null;
  };
}

function setState(text) {
  get("state-text").textContent = text;
}

function show(element, text) {
  element.textContent = text;
  element.hidden = !text;
}

function showError(text) {
  show(get("error"), text);
  if (text) get("error").scrollIntoView({ block: "nearest" });
}

get("cancel").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.fullscreenElement) running?.abort();
});
get("instruction").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  get("form").requestSubmit();
});

// -- result and history --------------------------------------------------------------------------

/** The edits of this visit, newest first. */
const edits = [];
let shownEdit = null;

function addToHistory(edit) {
  const button = document.createElement("button");
  button.type = "button";
  const texts = [edit.instruction, `Seed ${edit.values.seed}`].map((text) => {
    const span = document.createElement("span");
    span.textContent = text;
    return span;
  });
  const thumbnail = document.createElement("canvas");
  button.append(thumbnail, ...texts);
  button.addEventListener("click", () => restore(edit));
  const item = document.createElement("li");
  item.append(button);
  edit.button = button;
  edits.unshift(edit);
  get("edits").prepend(item);
  if (edits.length > HISTORY_LENGTH) {
    edits.pop();
    get("edits").lastElementChild.remove();
  }
  get("history").hidden = false;
  drawThumbnail(thumbnail, edit.result);
  showEdit(edit);
}

/** The small copy keeps thirty large images from being decoded. */
async function drawThumbnail(canvas, blob) {
  const bitmap = await createImageBitmap(blob);
  const scale = Math.min(1, THUMBNAIL_PX / Math.min(bitmap.width, bitmap.height));
  canvas.width = Math.max(1, bitmap.width * scale);
  canvas.height = Math.max(1, bitmap.height * scale);
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
}

function showEdit(edit) {
  shownEdit = edit;
  const { values } = edit;
  const [before, after] = [[get("before"), edit.input.blob], [get("after"), edit.result]].map(([image, blob]) => {
    URL.revokeObjectURL(image.src);
    image.src = URL.createObjectURL(blob);
    return image;
  });
  get("viewer").classList.remove("only-after");
  before.decode().catch(() => { // a format that the browser cannot show
    if (shownEdit === edit) get("viewer").classList.add("only-after");
  });
  after.decode().then(() => {
    get("viewer").style.setProperty("--ratio", after.naturalWidth / after.naturalHeight);
  }, () => {});
  get("download").href = after.src;
  get("download").download = `edit-seed-${values.seed}.png`;
  get("caption-instruction").textContent = edit.instruction;
  get("caption-settings").textContent = `Seed ${values.seed} · guidance ${values.guidance_scale} · image guidance ${values.image_guidance_scale} · ${values.steps} steps · resolution ${values.resolution}`;
  get("comparison").hidden = false;
  get("empty").hidden = true;
  for (const { button } of edits) button.setAttribute("aria-current", String(button === edit.button));
}

/** Show an earlier edit, and bring back the image, instruction and settings that led to it. */
function restore(edit) {
  showEdit(edit);
  setInput(edit.input.blob, edit.input.name);
  get("instruction").value = edit.instruction;
  for (const [name, value] of Object.entries(edit.values)) {
    if (name === "seed") seed.value = value;
    else setSetting(name, value);
  }
  get("result").scrollIntoView({ block: "nearest" });
}

get("divider").addEventListener("input", ({ target }) => {
  get("viewer").style.setProperty("--position", `${target.value}%`);
});
get("continue").addEventListener("click", () => {
  setInput(shownEdit.result, get("download").download);
  get("instruction").value = "";
  get("instruction").focus();
});
get("fullscreen").addEventListener("click", () => get("viewer").requestFullscreen());

// -- dark mode -----------------------------------------------------------------------------------

const systemDark = matchMedia("(prefers-color-scheme: dark)");

function applyTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  const isDark = theme ? theme === "dark" : systemDark.matches;
  get("theme").setAttribute("aria-pressed", String(isDark));
}

systemDark.addEventListener("change", () => applyTheme(stored("localStorage", "reasonpix-theme")));
get("theme").addEventListener("click", ({ target }) => {
  const theme = target.getAttribute("aria-pressed") === "true" ? "light" : "dark";
  stored("localStorage", "reasonpix-theme", theme);
  applyTheme(theme);
});
applyTheme(stored("localStorage", "reasonpix-theme"));
connect();
