// The page of `fastgen serve`: draws through the same interface as every client.
const $ = (id) => document.getElementById(id);
const make = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};

const EXPLAIN = {
  base: "The model as it is.",
  dc: "Dynamic chunking: a router keeps the image tokens that matter.",
  speculative: "Speculative decoding: several tokens are drafted, and verified in one pass.",
  search: "Noise search: a verifier scores candidates on the way, and the good ones go on.",
};
// Name, label, attributes of the field; an array is a choice.
const COMMON = [
  ["seed", "Seed", { type: "number", min: 0, step: 1, value: 0 }],
  ["steps", "Steps", { type: "number", min: 1, step: 1 }],
  ["guidance_scale", "Guidance scale", { type: "number", step: "any" }],
  ["negative_prompt", "Negative prompt", { type: "text" }],
];
const KNOBS = {
  base: [],
  dc: [
    ["tail_drop", "Tail drop", { type: "number", min: 0, max: 0.95, step: 0.05, value: 0.3 }],
    ["uncond_tail_drop", "Tail drop, unconditional", { type: "number", min: 0, max: 0.95, step: 0.05 }],
  ],
  speculative: [
    ["tree", "Draft", { type: "text", placeholder: "fastest" }],
    ["acceptance", "Acceptance", ["", "exact", "cascade"]],
    ["quality", "Quality (cascade)", { type: "number", min: 0, max: 1, step: 0.1 }],
    ["temperature", "Temperature", { type: "number", min: 0, step: 0.1 }],
  ],
  search: [
    ["policy", "Policy", ["threshold", "rbf", "svdd", "smc", "best-of-n"]],
    ["max_nfe", "Most forward passes", { type: "number", min: 1, step: 1, value: 120 }],
    ["target_score", "Stop at score", { type: "number", step: "any" }],
  ],
};
const NUMBERS = new Set(["seed", "steps", "guidance_scale", "tail_drop", "uncond_tail_drop", "quality", "temperature",
  "max_nfe", "target_score"]);

let models = [];
let running = null;
const session = [];

const headers = () => {
  const key = $("key").value || sessionStorage.getItem("key") || "";
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
};

async function loadModels() {
  try {
    const answer = await fetch("/v1/models", { headers: headers() });
    const body = await answer.json();
    if (!answer.ok) throw new Error(body.error.message);
    models = body.data;
    $("model").replaceChildren(...models.map((model) => make("option", { value: model.id }, model.id)));
    $("server").textContent = `${models.length} model${models.length > 1 ? "s" : ""}`;
    $("error").textContent = "";
    showMethods();
  } catch (error) {
    $("error").textContent = error.message;
  }
}

function showMethods() {
  const model = models.find((each) => each.id === $("model").value);
  if (!model) return;
  $("method").replaceChildren(...model.fastgen.methods.map((name) => make("option", { value: name }, name)));
  fields($("common"), COMMON);
  for (const name of ["steps", "guidance_scale"]) $(`f-${name}`).placeholder = model.fastgen.defaults[name] ?? "";
  const tokens = model.fastgen.methods.includes("speculative");
  for (const name of ["steps", "negative_prompt"]) $(`f-${name}`).disabled = tokens;
  showKnobs();
}

function showKnobs() {
  const method = $("method").value;
  $("explain").textContent = EXPLAIN[method] ?? "";
  fields($("knobs"), KNOBS[method] ?? []);
  $("own").hidden = !(KNOBS[method] ?? []).length;
  $("compare").disabled = method === "base";
}

function fields(place, list) {
  place.replaceChildren(...list.map(([name, label, kind]) => {
    const id = `f-${name}`;
    const field = Array.isArray(kind)
      ? make("select", { id, name }, ...kind.map((value) => make("option", { value }, value || "default")))
      : make("input", { id, name, ...kind });
    return make("div", {}, make("label", { for: id }, label), field);
  }));
}

function asked() {
  const body = { prompt: $("prompt").value, model: $("model").value, method: $("method").value };
  for (const field of document.querySelectorAll(".knobs input, .knobs select")) {
    if (field.value === "" || field.disabled) continue;
    body[field.name] = NUMBERS.has(field.name) ? Number(field.value) : field.value;
  }
  return body;
}

// Reads server-sent events of a POST.
async function* events(body, signal) {
  const answer = await fetch("/v1/images/generations", {
    method: "POST", headers: headers(), signal,
    body: JSON.stringify({ ...body, stream: true, progress: true, details: true, partial_images: 3 }),
  });
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    for (let end = text.indexOf("\n\n"); end >= 0; end = text.indexOf("\n\n")) {
      const line = text.slice(0, end).split("\n").find((each) => each.startsWith("data: "));
      text = text.slice(end + 2);
      if (line) yield JSON.parse(line.slice(6));
    }
  }
}

async function drawOne(body, title, shown, signal) {
  const image = make("img", { alt: `${title}: not finished` });
  const caption = make("figcaption", {}, `${title} …`);
  shown.replaceChildren(make("figure", {}, image, caption));
  const started = performance.now();
  const tree = { rows: [], seen: [] };
  for await (const event of events(body, signal)) {
    if (event.type === "error") throw new Error(event.error.message);
    if (event.type === "fastgen.progress") {
      showProgress(title, event, started);
      if (event.visits) {
        grow(tree, event.visits);
        $("inside").replaceChildren(treeOf(tree));
      }
    }
    if (event.type === "fastgen.candidate") {
      tree.seen.push(event);
      image.src = `data:image/png;base64,${event.b64_json}`;
    }
    if (event.type === "image_generation.partial_image") image.src = `data:image/png;base64,${event.b64_json}`;
    if (event.type === "image_generation.completed") {
      const result = { title, body, record: event.fastgen, data: event.b64_json, tree,
        seconds: (performance.now() - started) / 1000 };
      showPicture(result, image, caption);
      return result;
    }
  }
  throw new Error("the server ended the answer");
}

function showProgress(title, { step, steps }, started) {
  $("progress").value = step / steps;
  const left = (performance.now() - started) / 1000 * (steps - step) / step;
  $("left").textContent = `${title}: step ${step} of ${steps}, ${left.toFixed(1)} s left`;
}

function showPicture(result, image, caption) {
  image.src = `data:image/png;base64,${result.data}`;
  image.alt = `${result.title}: ${result.body.prompt}`;
  image.className = Number(result.record.size.split("x")[0]) > 256 ? "large" : "";
  const own = result.record.stats.wall_seconds / (result.record.stats.images ?? 1);
  const contract = { exact: "exact", distribution: "same distribution", lossy: "lossy" }[result.record.loss];
  const name = `${result.body.method ?? "picture"}-${result.record.seed}`;
  const record = URL.createObjectURL(new Blob([JSON.stringify(result.record, null, 1)], { type: "application/json" }));
  caption.replaceChildren(
    make("strong", {}, result.title), ` ${own.toFixed(2)} s, ${contract} `, make("br"),
    make("a", { href: image.src, download: `${name}.png` }, "Picture"),
    make("a", { href: record, download: `${name}.json` }, "Settings and costs"));
}

// ---- what a method did ----

function showInside(result) {
  const inside = $("inside");
  const details = result.record.details ?? {};
  inside.replaceChildren();
  if (details.map) {
    inside.append(make("figure", {},
      make("img", { src: `data:image/png;base64,${details.map}`, alt: "Noisy picture, boundary probability and kept tokens by step" }),
      make("figcaption", {}, "By step: the noisy picture, the router's probability, and the tokens that are kept")));
  }
  if (details.search) inside.append(treeOf(result.tree, details.search));
  const lengths = result.record.stats.accepted_lengths ?? [];
  if (lengths.length && (result.record.stats.images ?? 1) === 1) inside.append(roundsOf(lengths));
}

// Adds what a round evaluated. The candidates that it scored were sent before, in an order of their own.
function grow(tree, visits) {
  for (const [chain, number, parent, time, score] of visits) {
    const place = tree.seen.findIndex((each) => each.score !== null && each.score === score);
    const [preview] = place < 0 ? [] : tree.seen.splice(place, 1);
    tree.rows.push({ chain, number, parent, time, score, preview });
  }
  tree.seen = [];
}

// The tree of a search; `search` is its report, once there is one.
function treeOf({ rows }, search) {
  const scores = rows.map((row) => row.score).filter((score) => score !== null);
  const low = Math.min(...scores), high = Math.max(...scores, low + 1e-6);
  const view = svg(Math.max(...rows.map((row) => row.time)) + 1, low, high);
  const at = new Map(rows.map((row) => [`${row.chain}/${row.number}`, row]));
  const way = new Set(search?.path);
  const chosen = (row) => row.chain === search?.chain && way.has(row.number);
  const height = (row) => row.score ?? low;
  for (const row of rows) {
    const parent = at.get(`${row.chain}/${row.parent}`);
    if (parent) view.line(parent.time, height(parent), row.time, height(row), chosen(row) ? "#c0392b" : "#8888", chosen(row) ? 2 : 0.7);
  }
  for (const row of rows) {
    if (row.preview) view.picture(row.time, height(row), row.preview.b64_json, chosen(row) ? "#c0392b" : "#4a6fa5");
    else view.dot(row.time, height(row), chosen(row) ? "#c0392b" : "#4a6fa5", 2.5);
  }
  const found = search
    ? `in red the way to the picture. ${search.policy}, ${search.evaluations} evaluations, ${search.nfe} forward passes, score ${search.score?.toFixed(3)}`
    : `${rows.length} evaluations, best score ${high.toFixed(3)}`;
  return make("figure", {}, view.element, make("figcaption", {}, `Every evaluation at its step and score; ${found}`));
}

function svg(columns, low, high) {
  const space = "http://www.w3.org/2000/svg";
  const element = document.createElementNS(space, "svg");
  element.setAttribute("viewBox", "0 0 600 240");
  element.setAttribute("class", "tree");
  element.setAttribute("role", "img");
  element.setAttribute("aria-label", "Candidates by step and score");
  const x = (value) => 50 + 530 * value / Math.max(1, columns - 1);
  const y = (value) => 220 - 200 * (value - low) / (high - low);
  const add = (tag, attributes, text) => {
    const part = document.createElementNS(space, tag);
    for (const [name, value] of Object.entries(attributes)) part.setAttribute(name, value);
    if (text) part.textContent = text;
    element.append(part);
  };
  for (const value of [low, high]) add("text", { x: 2, y: y(value) + 3 }, value.toFixed(2));
  return {
    element,
    dot: (a, b, fill, r) => add("circle", { cx: x(a), cy: y(b), r, fill }),
    picture: (a, b, data, stroke) => {
      const [left, top] = [x(a) - 9, y(b) - 9];
      add("image", { x: left, y: top, width: 18, height: 18, href: `data:image/png;base64,${data}` });
      add("rect", { x: left, y: top, width: 18, height: 18, fill: "none", stroke });
    },
    line: (a, b, c, d, stroke, width) => add("line", { x1: x(a), y1: y(b), x2: x(c), y2: y(d), stroke, "stroke-width": width }),
  };
}

function roundsOf(lengths) {
  // A round gives its accepted tokens and one more.
  const rounds = lengths.flatMap((length, round) => Array(length + 1).fill(round));
  const side = Math.ceil(Math.sqrt(rounds.length));
  const canvas = make("canvas", { width: side, height: side, role: "img", "aria-label": `Tokens coloured by round, ${lengths.length} rounds` });
  const context = canvas.getContext("2d");
  rounds.forEach((round, i) => {
    context.fillStyle = `hsl(${(round * 137.5) % 360} 65% 55%)`;
    context.fillRect(i % side, Math.floor(i / side), 1, 1);
  });
  const mean = rounds.length / lengths.length;
  return make("figure", {}, canvas, make("figcaption", {},
    `Tokens coloured by the round that drew them: ${lengths.length} rounds, ${mean.toFixed(1)} tokens each`));
}

function remember(results) {
  const place = session.push(results) - 1;
  const first = results[0];
  const button = make("button", { type: "button", "aria-label": `Show again: ${first.body.prompt}, ${first.body.method}` },
    make("img", { src: `data:image/png;base64,${first.data}`, alt: "" }), `${first.body.method}, seed ${first.record.seed}`);
  button.addEventListener("click", () => showAgain(session[place]));
  $("history").prepend(make("li", {}, button));
}

function showAgain(results) {
  $("pair").replaceChildren(...results.map((result) => {
    const image = make("img"), caption = make("figcaption");
    showPicture(result, image, caption);
    return make("div", {}, make("figure", {}, image, caption));
  }));
  showInside(results[0]);
}

async function draw(event) {
  event.preventDefault();
  if ($("key").value) sessionStorage.setItem("key", $("key").value);
  $("error").textContent = "";
  $("draw").disabled = true;
  $("stop").disabled = false;
  $("working").hidden = false;
  $("inside").replaceChildren();
  $("status").textContent = "Drawing";
  running = new AbortController();
  const body = asked();
  // A model with dynamic chunking is compared with itself without tail drops.
  const stock = { prompt: body.prompt, model: body.model, method: body.method === "dc" ? "dc" : "base", seed: body.seed };
  for (const name of ["steps", "guidance_scale", "negative_prompt"]) if (name in body) stock[name] = body[name];
  const jobs = [[body, `With ${body.method}`]];
  if ($("compare").checked && !$("compare").disabled) jobs.push([stock, body.method === "dc" ? "Without tail drops" : "Without"]);
  const places = jobs.map(() => make("div"));
  $("pair").replaceChildren(...places);
  try {
    const results = [];
    for (const [i, [each, title]] of jobs.entries()) {
      results.push(await drawOne(each, title, places[i], running.signal));
      if (i === 0) showInside(results[0]);
    }
    remember(results);
    $("status").textContent = "Done";
  } catch (error) {
    const stopped = error.name === "AbortError";
    $("status").textContent = stopped ? "Stopped" : "";
    $("error").textContent = stopped ? "" : error.message;
  } finally {
    running = null;
    $("draw").disabled = false;
    $("stop").disabled = true;
    $("working").hidden = true;
  }
}

$("form").addEventListener("submit", draw);
$("stop").addEventListener("click", () => running?.abort());
$("model").addEventListener("change", showMethods);
$("method").addEventListener("change", showKnobs);
$("key").addEventListener("change", loadModels);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
loadModels();
