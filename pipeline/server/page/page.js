// The page at /: an image, tasks, and what their packs say. Texts of the server are set as text,
// never as HTML. The token stays in memory.

import { colourOf, drawMask } from "./masks.js";

const PAGE = 100;
const at = (id) => document.getElementById(id);
const known = new Map(); // tasks by name, as the server lists them
let token = null;
let next = null;

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function ask(path, content) {
  const headers = token === null ? {} : { Authorization: `Bearer ${token}` };
  const options = { headers };
  if (content !== undefined) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(content) });
  }
  const response = await fetch(path, options);
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) {
    throw new Refused(response.status, answer.error ?? `the server answers ${response.status}`);
  }
  return answer;
}

function say(message, isError = false) {
  at("status").textContent = message;
  at("status").classList.toggle("error", isError);
}

function explain(error) {
  if (error.status === 401) {
    say(token === null ? "This server needs a token." : "The token is wrong.", token !== null);
    at("access").hidden = false;
    at("token").focus();
    return;
  }
  const isUnreachable = error instanceof TypeError;
  say(isUnreachable ? "The server is unreachable; try again." : error.message, true);
}

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  made.textContent = text;
  return Object.assign(made, attributes);
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;
const bytes = (count) => count.toLocaleString("en");

function showTask(task) {
  known.set(task.name, task);
  const box = element("input", "", { type: "checkbox", name: "task", value: task.name });
  const label = element("label", "");
  const tested = task.test_metric === null ? "" : `, ${task.metric} ${percent(task.test_metric)}`;
  const facts = element("small", ` ${bytes(task.size_bytes)} bytes${tested}`);
  label.append(box, ` ${task.name}`, facts);
  const item = element("li", "");
  item.append(label);
  at("tasks").append(item);
}

async function loadTasks() {
  const after = next === null ? "" : `&after=${encodeURIComponent(next)}`;
  try {
    const found = await ask(`v1/tasks?limit=${PAGE}${after}`);
    found.tasks.filter((task) => !known.has(task.name)).forEach(showTask);
    next = found.next;
    at("more").hidden = next === null;
    at("access").hidden = true;
    filterTasks();
    say(known.size ? "" : "The registry has no task for this server's backbone.");
  } catch (error) {
    explain(error);
  }
}

const boxes = () => [...document.querySelectorAll("#tasks input")];

function filterTasks() {
  const wanted = at("filter").value.trim().toLowerCase();
  for (const box of boxes()) {
    box.closest("li").hidden = !box.value.toLowerCase().includes(wanted);
  }
}

function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error(`${file.name} cannot be read; choose it again`));
    reader.readAsDataURL(file);
  });
}

function showImage() {
  const [file] = at("image").files;
  URL.revokeObjectURL(at("preview").src);
  at("preview").hidden = !file;
  if (file) {
    at("preview").src = URL.createObjectURL(file);
    at("preview").alt = `The chosen image, ${file.name}`;
  }
}

// What a prediction says, and how probable it is: of one class, or of each label. Of a mask, its
// classes, the largest first, and their shares of the image.
function readable(prediction) {
  if (prediction.areas !== undefined) {
    const areas = Object.entries(prediction.areas).filter(([, share]) => share > 0);
    areas.sort(([, share], [, other]) => other - share);
    return [
      areas.map(([name]) => name).join(", "),
      areas.map(([, share]) => percent(share)).join(", "),
    ];
  }
  if (prediction.labels === undefined) {
    const set = prediction.set?.join(", ") || "none: no class is probable enough";
    const said = prediction.set === undefined ? "" : ` (set: ${set})`;
    return [prediction.label + said, percent(prediction.probability)];
  }
  const found = prediction.labels.map((label) => percent(prediction.probabilities[label]));
  return [prediction.labels.join(", ") || "none", found.join(", ")];
}

function showAnswers(predictions) {
  const rows = predictions.map((prediction) => {
    const row = element("tr", "");
    row.append(element("th", prediction.task, { scope: "row" }));
    const size = bytes(known.get(prediction.task).size_bytes);
    row.append(...[...readable(prediction), size].map((text) => element("td", text)));
    return row;
  });
  at("answers").tBodies[0].replaceChildren(...rows);
  at("answers").hidden = false;
}

// The classes of a mask by their colours.
function legendOf(classes, areas) {
  const legend = element("ul", "", { className: "legend" });
  for (const [number, name] of classes.entries()) {
    const colour = colourOf(number);
    if (colour === null || !areas[name]) continue;
    const swatch = element("span", "", { className: "swatch" });
    swatch.style.backgroundColor = `rgb(${colour.join(" ")})`;
    const item = element("li", "");
    item.append(swatch, ` ${name}`);
    legend.append(item);
  }
  return legend;
}

async function showMasks(predictions) {
  const figures = [];
  for (const { task, areas, mask } of predictions) {
    if (mask === undefined) continue;
    const { classes } = await ask(`v1/tasks/${encodeURIComponent(task)}`);
    const canvas = await drawMask(mask, at("preview"));
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `The mask of ${task} over the image`);
    const figure = element("figure", "");
    figure.append(element("figcaption", task), canvas, legendOf(classes ?? [], areas));
    figures.push(figure);
  }
  at("masks").replaceChildren(...figures);
}

async function predict() {
  const tasks = boxes().filter((box) => box.checked).map((box) => box.value);
  if (!tasks.length) {
    say("Choose one or more tasks.", true);
    return;
  }
  say("Predicting...");
  at("predict").disabled = true;
  const began = performance.now();
  try {
    const image = await base64(at("image").files[0]);
    const { predictions, seconds } = await ask("v1/predict", { image, tasks });
    const waited = Math.round(performance.now() - began);
    showAnswers(predictions);
    await showMasks(predictions);
    const noun = predictions.length === 1 ? "answer" : "answers";
    say(
      `${predictions.length} ${noun} in ${waited} ms, of which the server took` +
        ` ${Math.round(1000 * seconds)} ms.`,
    );
  } catch (error) {
    explain(error);
  } finally {
    at("predict").disabled = false;
  }
}

function submitted(form, action) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    action();
  });
}

submitted(at("access"), () => {
  token = at("token").value;
  loadTasks();
});
submitted(at("ask"), predict);
at("image").addEventListener("change", showImage);
at("filter").addEventListener("input", filterTasks);
at("more").addEventListener("click", loadTasks);
at("all").addEventListener("click", () => {
  for (const box of boxes()) box.checked ||= !box.closest("li").hidden;
});
at("none").addEventListener("click", () => {
  for (const box of boxes()) box.checked = false;
});
for (const type of ["dragenter", "dragover", "dragleave", "drop"]) {
  at("drop").addEventListener(type, (event) => {
    event.preventDefault();
    at("drop").classList.toggle("over", type === "dragenter" || type === "dragover");
    if (type === "drop" && event.dataTransfer.files.length) {
      at("image").files = event.dataTransfer.files;
      showImage();
    }
  });
}
loadTasks();
