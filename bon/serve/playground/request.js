const SETTINGS = ["prompt", "n", "scorer", "system", "temperature", "max_tokens", "stop_at", "deadline_s", "seed", "second", "credit"];
const EXAMPLES = {
  haiku: "Write a haiku about autumn rain.",
  email: "Write a short, polite email that asks for a refund of a train ticket.",
  explain: "Explain in two sentences why the sky is blue.",
  list: "List three uses for old newspapers, one a line.",
};
let aborter = null, model = null;

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = h("textarea", {"aria-hidden": "true"});
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const before = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = before; }, 1200);
}

function take(about) {
  if (about.event === "queued") {
    run.queued = true;
    return say(`Waiting: number ${about.position} in the queue`);
  }
  if (run.queued) {
    Object.assign(run, {queued: false, offset: performance.now()});
    say(`${run.n} being written`);
  }
  if (about.timing) return finish(about);
  const row = run.rows.get(about.index);
  if (!row) return;
  if (about.event === "text") { row.partial += about.more; return; }
  if (about.event === "candidate" && ![...run.rows.values()].some(written)) run.offset = performance.now() - 1000 * about.sampled_s;
  Object.assign(row, about, {version: row.version + 1});
  run.dirty = true;
  const rows = [...run.rows.values()], rewards = rows.map((each) => each.reward).filter((reward) => reward != null);
  const best = rewards.length ? `, best ${number(Math.max(...rewards))}` : "";
  say(`${rows.filter(written).length} of ${run.n} sampled, ${rewards.length} scored${best}`);
}

function finish(about) {
  const returned = about.choices[0] && about.candidates[about.choices[0].index];
  const best = about.best ?? (returned && returned.text.trim() ? returned.index : null);
  Object.assign(run, {best, badge: about.best == null ? "first answer, without a reward" : "winner", answer: about, n: about.n, prompt: about.instruction});
  run.rows = new Map(about.candidates.map((row) => [row.index, row]));
  const {sample_s, score_s, overlap_s, total_s, queue_s} = about.timing;
  $("times").textContent = `sampling ${seconds(sample_s)}, scoring ${seconds(score_s)}, of that at the same time ${seconds(overlap_s)}`;
  const pruned = about.statuses.pruned ? `, ${about.statuses.pruned} pruned` : "";
  const queued = queue_s > .05 ? `, ${seconds(queue_s)} of it in the queue` : "";
  $("warnings").replaceChildren(...about.warnings.map((text) => h("li", {}, text)));
  $("warnings").hidden = !about.warnings.length;
  $("exports").hidden = false;
  end("done", `Done in ${seconds(total_s)}${queued}: best of ${about.n}${pruned}.${about.reason ? ` ${about.reason[0].toUpperCase()}${about.reason.slice(1)}.` : ""}`);
}

// What is there stays in sight, however the run ended.
function end(state, said) {
  run.ended = now();
  run.over = state;
  if ([...run.rows.values()].some((row) => written(row) || row.partial)) draw();
  else $("figures").hidden = $("others").hidden = true;
  say(said, state);
}

function complain(message) {
  $("alert").textContent = message;
  $("alert").hidden = false;
}

function request() {
  const value = (id) => $(id).value.trim();
  const messages = [{role: "user", content: $("prompt").value}];
  if (value("system")) messages.unshift({role: "system", content: value("system")});
  const body = {messages, best_of_n: {n: Number(value("n"))}};
  if (value("scorer")) body.best_of_n.scorer = value("scorer");
  if (value("credit")) body.best_of_n.credit = true;
  for (const id of ["temperature", "max_tokens", "seed"]) if (value(id)) body[id] = Number(value(id));
  for (const id of ["stop_at", "deadline_s"]) if (value(id)) body.best_of_n[id] = Number(value(id));
  return body;
}

const headers = () => ({"Content-Type": "application/json", ...($("key").value ? {Authorization: `Bearer ${$("key").value}`} : {})});

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    const parts = (buffer + value).split("\n\n");
    buffer = parts.pop();
    for (const part of parts) if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
  }
}

async function post(body, more, signal) {
  const asked = {...body, stream: more.stream, best_of_n: {...body.best_of_n, ...more.best_of_n, return_candidates: true}};
  const response = await fetch("v1/chat/completions", {method: "POST", headers: headers(), body: JSON.stringify(asked), signal});
  if (response.ok) return response;
  if (response.status === 401) { $("more").open = true; $("key").focus(); }
  throw new Error((await response.json()).error.message);
}

async function go(event) {
  event.preventDefault();
  if (aborter) aborter.abort();
  const mine = aborter = new AbortController();
  remember();
  const body = request(), second = $("second").value, n = body.best_of_n.n;
  if (second && body.seed == null) body.seed = Math.floor(Math.random() * 2 ** 31);   // both scorers get the same samples
  const rows = Array.from({length: n}, (_, index) => [index, {index, partial: "", version: 1}]);
  const shown = run = {n, body, prompt: body.messages.at(-1).content, rows: new Map(rows), best: null, over: null, unit: true, offset: performance.now(), items: {}};
  for (const id of ["alert", "warnings", "intro", "winner", "others", "figures", "compared", "exports"]) $(id).hidden = true;
  $("list").replaceChildren();
  $("times").textContent = "";
  $("stop").disabled = false;
  say("Asking…", "busy");
  let redraw;
  try {
    const response = await post(body, {stream: true}, mine.signal);
    $("figures").hidden = false;
    say(`${n} being written`);
    draw();
    if (innerWidth < 960) $("status").scrollIntoView();   // below the form on a narrow screen
    redraw = setInterval(() => {
      if (run !== shown || run.over) return;
      if (run.dirty) draw();
      else { drawTimeline(); drawLive(); }
      run.dirty = false;
    }, 100);
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.best_of_n && run === shown) take(chunk.best_of_n);
    }
    if (run !== shown) return;
    if (!run.over) throw new Error("The connection ended before the answer was there.");
    if (second) await compare(second, mine.signal);
  } catch (error) {
    if (run !== shown) return;
    const sampled = [...run.rows.values()].filter(written).length, reached = sampled ? ` ${sampled} of ${run.n} were sampled.` : "";
    if (error.name === "AbortError") return run.over ? say("Stopped.", "done") : end("idle", `Stopped.${reached}`);
    complain(error.name === "TypeError" ? `The connection to the server failed: ${error.message}` : error.message);
    if (!run.over) end("failed", `Failed.${reached}`);
    else say("The comparison failed.", "done");
  } finally {
    clearInterval(redraw);
    if (aborter === mine) { aborter = null; $("stop").disabled = true; }
  }
}

async function compare(second, signal) {
  const said = $("status").textContent;
  say(`The same for the scorer ${second}…`, "busy");
  const other = (await (await post(run.body, {best_of_n: {scorer: second, credit: false}}, signal)).json()).best_of_n;
  drawCompared([run.answer.scorer, other.scorer], [run.answer, other]);
  run.compared = other;
  say(said, "done");
}

function code(kind) {
  const body = {model: model && model.id, ...request()}, url = new URL("v1", location.href).href;
  if (kind === "curl") {
    const key = $("key").value ? ` -H "Authorization: Bearer $BON_API_KEY"` : "";
    return `curl ${url}/chat/completions -H 'Content-Type: application/json'${key} \\\n  -d '${JSON.stringify(body).replaceAll("'", "'\\''")}'`;
  }
  const {best_of_n, ...fields} = body, key = $("key").value ? `os.environ["BON_API_KEY"]` : `"none"`;
  return `${$("key").value ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(url)}, api_key=${key})
answer = client.chat.completions.create(
${Object.entries({...fields, extra_body: {best_of_n}}).map(([name, value]) => `    ${name}=${JSON.stringify(value)},`).join("\n")}
)
print(answer.choices[0].message.content, answer.best_of_n["reward"])`;
}

function save(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], {type}));
  h("a", {href: url, download: name}).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

function page() {
  const main = document.querySelector("main").cloneNode(true);
  for (const left of main.querySelectorAll("button, [hidden], #exports")) left.remove();
  for (const folded of main.querySelectorAll("details")) folded.open = true;
  main.prepend(h("div", {class: "card"}, h("h2", {}, `Prompt to ${$("model").textContent}`), h("div", {class: "text"}, run.body.messages.at(-1).content)));
  return `<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'"><title>bon</title>
<style>${document.querySelector("style").textContent}</style></head><body data-state="done"><div class="layout alone">${main.outerHTML}</div></body></html>`;
}

function remember() {
  const settings = new URLSearchParams();
  for (const id of SETTINGS) if ($(id).value) settings.set(id, $(id).value);
  history.replaceState(null, "", `#${settings}`);
}

function recall() {
  const settings = new URLSearchParams(location.hash.slice(1));
  for (const id of SETTINGS) {
    if (!settings.has(id)) continue;
    const field = $(id);
    if (field.tagName !== "SELECT" || [...field.options].some((option) => option.value === settings.get(id))) field.value = settings.get(id);
  }
  if (SETTINGS.slice(3).some((id) => settings.has(id))) $("more").open = true;
}

async function start() {
  $("form").addEventListener("submit", go);
  $("form").addEventListener("invalid", () => { $("more").open = true; }, true);   // a browser points to no field that is folded away
  $("stop").addEventListener("click", () => aborter && aborter.abort());
  $("link").addEventListener("click", (event) => { remember(); copy(location.href, event.currentTarget); });
  for (const kind of ["curl", "python"]) {
    $(kind).addEventListener("click", (event) => {
      $("snippet").textContent = code(kind);
      $("snippet").hidden = false;
      copy($("snippet").textContent, event.currentTarget);
    });
  }
  $("html").addEventListener("click", () => save("bon.html", "text/html", page()));
  $("json").addEventListener("click", () => save("bon.json", "application/json", JSON.stringify({request: run.body, answer: run.answer, compared: run.compared}, null, 2)));
  $("key").addEventListener("change", describe);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); $("form").requestSubmit(); }
    if (event.key === "Escape" && aborter) aborter.abort();
  });
  window.addEventListener("hashchange", recall);
  window.addEventListener("resize", () => { if (run && run.answer) draw(); });
  recall();
  await describe();
}

/** Fills a list once it is known; what was chosen stays, else what the link says. */
function offer(id, options) {
  const list = $(id);
  const chosen = list.options.length ? list.value : new URLSearchParams(location.hash.slice(1)).get(id);
  list.replaceChildren(...options);
  if (options.some((option) => option.value === chosen)) list.value = chosen;
}

async function describe() {
  try {
    const response = await fetch("v1/models", {headers: headers()});
    if (response.status === 401) { $("more").open = true; return say("This server wants an API key (More settings)."); }
    const answer = await response.json();
    if (!response.ok) {   // a server before this one that does not answer yet
      setTimeout(describe, 3000);
      return say(answer.error.message);
    }
    model = answer.data[0];
    if (document.body.dataset.state === "idle") say("Ready.");
    const {n, max_n, scorers, kinds} = model.best_of_n;
    $("model").textContent = model.id;
    $("n").max = max_n;
    $("n").defaultValue = n;   // shown only where nobody has said another one, and a link has not either
    const options = () => scorers.map((name) => h("option", {value: name}, name));
    offer("scorer", options());
    offer("second", [h("option", {value: ""}, "none"), ...options()]);
    $("embedded").hidden = !kinds;
    $("examples").replaceChildren(...Object.entries(kinds || EXAMPLES).map(([kind, text]) =>
      h("button", {class: "small", type: "button", onclick: () => { $("prompt").value = text; $("prompt").focus(); }}, kind)));
  } catch { say("The server cannot be reached.", "failed"); }
}

start();
