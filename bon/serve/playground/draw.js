"use strict";
// Texts of models reach the page as text nodes only: no innerHTML, no attributes made from them.
const $ = (id) => document.getElementById(id);
const FOLD = 8;   // candidates in sight; the others are folded away
let run = null;   // what is shown: {n, body, prompt, rows: Map(index -> candidate), best, over, offset, items}

function h(tag, props, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null && child !== false));
  return element;
}
function s(tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text != null) element.textContent = text;
  return element;
}
const number = (value, digits = 3) => (value == null ? "–" : Number(value).toFixed(digits));
const seconds = (value) => (value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(value < 10 ? 2 : 1)} s`);
const say = (text, state) => { $("status").textContent = text; if (state) document.body.dataset.state = state; };
const now = () => run.ended ?? (performance.now() - run.offset) / 1000;
const written = (row) => row.text != null;

// Spans count code points, JavaScript strings count UTF-16 units.
const cut = (text, [from, to]) => Array.from(text).slice(from, to).join("");
function marked(text, spans, kind) {
  const parts = [];
  let at = 0;
  for (const [from, to] of spans || []) {
    parts.push(cut(text, [at, from]), h("mark", {class: kind}, cut(text, [from, to])));
    at = to;
  }
  return [...parts, cut(text, [at])];
}

// Of Markdown what is hard to read raw: code, headings and strong words. The rest is text, line for line.
const inline = (line) => line.split(/(`[^`]+`|\*\*[^*]+\*\*)/).map((part, place) =>
  place % 2 ? h(part[0] === "`" ? "code" : "strong", {}, part.replace(/^(`|\*\*)|(`|\*\*)$/g, "")) : part);
function rendered(text) {
  const nodes = [];
  let code = null;
  for (const line of text.split(/(?<=\n)/)) {
    if (/^ {0,3}```/.test(line)) { if (code) code = null; else nodes.push(code = h("pre")); }
    else if (code) code.append(line);
    else if (/^#{1,6} /.test(line)) nodes.push(h("strong", {}, line.replace(/^#+ /, "")));
    else nodes.push(...inline(line));
  }
  return nodes;
}

// The winner's sentences, tinted by what the reward loses without each; text for who cannot see the tint.
function credited(text, credits) {
  const most = Math.max(...credits.map((each) => Math.abs(each.credit ?? 0)), 1e-9), nodes = [];
  let at = 0;
  for (const {start, end, credit, reason} of credits) {
    const said = credit == null ? `no credit: ${reason}` : `credit ${credit < 0 ? "" : "+"}${number(credit)}`;
    const part = h("span", {class: `credit${credit < 0 ? " costs" : ""}`, tabindex: "0", title: said},
      ...rendered(cut(text, [start, end])), h("span", {class: "value"}, ` (${said})`));
    part.style.setProperty("--share", `${100 * Math.abs(credit ?? 0) / most}%`);
    nodes.push(...rendered(cut(text, [at, start])), part);
    at = end;
  }
  return [...nodes, ...rendered(cut(text, [at]))];
}

function phase(row) {
  if (row.status) return "no reward";
  if (run.over) return written(row) ? "not scored" : "not finished";
  return run.queued ? "in the queue" : written(row) ? "being scored" : "being written";
}

function card(row, {badge, alike = [row]} = {}) {
  const scored = row.reward != null, text = row.text ?? row.partial;
  const pruned = row.status === "pruned" || row.status === "late";
  const bound = row.upper_bound != null ? `≤ ${number(row.upper_bound)}` : null;
  const meter = h("i", {});
  if (scored && run.unit) meter.style.width = `${Math.max(0, Math.min(1, row.reward)) * 100}%`;
  const missed = row.inferred != null && row.missed || [];
  const facts = [
    row.precision != null && `precision ${number(row.precision, 2)}, recall ${number(row.recall, 2)}`,
    missed.length > 0 && !badge && `missed: ${missed.map((span) => cut(run.prompt, span)).join(" ")}`,
    row.completion_tokens != null && `${row.completion_tokens} tokens`,
    row.sampled_s != null && `sampled after ${seconds(row.sampled_s)}`,
    row.scored_s && `scored in ${seconds(row.scored_s[1] - row.scored_s[0])}`,
  ].filter(Boolean).join(" · ");
  const indices = alike.map((each) => each.index).sort((a, b) => a - b);
  const tag = (shown, kind) => shown && h("span", {class: `tag ${kind}`}, shown);
  return h("article", {class: `card candidate ${badge ? "winner" : pruned ? "pruned" : written(row) ? "" : "waiting"}`},
    h("header", {},
      tag(badge, "win"),
      h("span", {class: `reward${row.status === "echo" ? " void" : ""}`}, scored ? number(row.reward) : bound || phase(row)),
      h("span", {class: "name"}, indices.length > 1 ? `${indices.length} alike: ${indices.join(", ")}` : `candidate ${row.index}`),
      !run.over && !row.status && h("span", {class: "name clock"}),
      tag(row.status !== "ok" && row.status, pruned ? "" : "warn"),
      tag(row.finish_reason === "length" && "cut off", "warn"),
      tag(row.finish_reason === "abort" && "sampling stopped", ""),
      row.text && h("button", {class: "small", type: "button", "aria-label": `Copy candidate ${row.index}`,
        onclick: (event) => copy(row.text, event.currentTarget)}, "Copy")),
    scored && run.unit && h("div", {class: "meter", "aria-hidden": "true"}, meter),
    text || !written(row) ? h("div", {class: "text", tabindex: "0"}, ...(badge && run.answer.credit ? credited(text, run.answer.credit) : written(row) ? rendered(text) : [text])) : h("p", {class: "quiet"}, "no text"),
    badge && run.answer.credit?.length > 0 && h("p", {class: "numbers"}, "Credit: what the reward loses without a sentence. Point at one, or tab to it, for its number."),
    row.inferred != null && h("p", {class: "inferred"}, h("b", {}, "inferred instruction"), ...marked(row.inferred, row.matched)),
    badge && missed.length > 0 && h("p", {class: "inferred"}, h("b", {}, "your prompt, with the words that were missed"), ...marked(run.prompt, missed, "missed")),
    row.inferred == null && row.explanation && h("p", {class: "inferred"}, h("b", {}, "explanation"), row.explanation),
    row.reason && h("p", {class: "numbers"}, row.reason),
    facts && h("p", {class: "numbers"}, facts));
}

// While candidates come, each has a card that keeps its place; only what changed is drawn again.
function drawLive() {
  const rows = [...run.rows.values()], list = $("list");
  for (const row of rows.slice(0, FOLD)) {
    const item = run.items[row.index] ||= list.appendChild(h("li")), version = `${row.version} ${run.queued}`;
    if (item.version !== version && !item.contains(document.activeElement)) {
      item.replaceChildren(card(row));
      item.version = version;
    }
    if (row.status) continue;
    item.querySelector(".clock").textContent = run.queued ? "" : seconds(now() - (row.sampled_s || 0));
    const shown = item.querySelector(".text");
    if (!written(row) && shown.textContent !== row.partial) { shown.textContent = row.partial; shown.scrollTop = shown.scrollHeight; }
  }
  if (rows.length > FOLD) {
    const item = run.items.more ||= list.appendChild(h("li", {class: "card waiting"}));
    item.textContent = `${rows.length - FOLD} more, ${rows.slice(FOLD).filter(written).length} of them written`;
  }
  $("others").hidden = false;
}

// At the end: the best first, copies as one, long lists folded.
function drawCards() {
  const rank = (row) => (row.index === run.best ? -Infinity : row.reward != null ? -row.reward : row.upper_bound != null ? 1e6 - row.upper_bound : 1e9);
  const alike = new Map();
  for (const row of [...run.rows.values()].sort((a, b) => rank(a) - rank(b) || a.index - b.index)) {
    const key = row.text || row.partial || `no text, ${phase(row)}`;
    alike.set(key, [...(alike.get(key) || []), row]);
  }
  const groups = [...alike.values()], winner = groups[0][0].index === run.best && groups.shift();
  $("winner").replaceChildren(...(winner ? [card(winner[0], {badge: run.badge, alike: winner})] : []));
  const items = groups.map((group) => h("li", {}, card(group[0], {alike: group})));
  const folded = items.splice(FOLD);
  if (folded.length) items.push(h("li", {}, h("details", {}, h("summary", {}, `${folded.length} more`), h("ol", {}, ...folded))));
  $("list").replaceChildren(...items);
  $("winner").hidden = !winner;
  $("others").hidden = !items.length;
}

function drawTimeline() {
  const rows = [...run.rows.values()];
  const ends = rows.flatMap((row) => [row.sampled_s || 0, row.scored_s ? row.scored_s[1] : 0]);
  const end = Math.max(run.over === "done" ? 0 : now(), ...ends, 0.001);
  const width = Math.max(260, $("timeline").clientWidth), left = 26, step = rows.length > 24 ? 9 : rows.length > 12 ? 14 : 20, height = rows.length * step;
  const x = (time) => left + (width - left - 6) * Math.min(time, end) / end;
  const bar = (from, to, y, kind) => s("rect", {x: x(from), y: y + step * .2, width: Math.max(1.5, x(to) - x(from)), height: step * .6, rx: 2, class: kind});
  const svg = s("svg", {viewBox: `0 0 ${width} ${height + 22}`, role: "img", "aria-label": "When each candidate was sampled and scored"});
  const sampled = rows.filter((row) => row.sampled_s != null);
  const scored = rows.filter((row) => row.scored_s && row.same_as == null);
  if (sampled.length && scored.length) {
    const from = Math.min(...scored.map((row) => row.scored_s[0]));
    const to = Math.min(Math.max(...sampled.map((row) => row.sampled_s)), Math.max(...scored.map((row) => row.scored_s[1])));
    if (to > from) svg.append(s("rect", {x: x(from), y: 0, width: x(to) - x(from), height, class: "both"}));
  }
  const live = run.over ? " dim" : " live";
  rows.forEach((row, place) => {
    const y = place * step, dim = row.status === "pruned" || row.status === "late" ? " dim" : "";
    if (step > 10 || place % 4 === 0) svg.append(s("text", {x: left - 6, y: y + step * .5 + 4, "text-anchor": "end", class: row.index === run.best ? "row-best" : ""}, row.index));
    if (row.sampled_s != null) svg.append(bar(0, row.sampled_s, y, `sample${dim}`));
    else if (!run.queued) svg.append(bar(0, now(), y, `sample${live}`));
    if (row.scored_s && row.same_as == null) svg.append(bar(row.scored_s[0], row.scored_s[1], y, `score${dim}`));
    else if (row.sampled_s != null && !row.status) svg.append(bar(row.sampled_s, now(), y, `score${live}`));
  });
  svg.append(s("line", {x1: left, x2: width, y1: height + 2, y2: height + 2, class: "axis"}));
  const power = 10 ** Math.floor(Math.log10(end / 4)), room = (width - left) / 90;
  const every = [1, 2, 5, 10, 20, 50].map((factor) => factor * power).find((size) => end / size <= room) || end;
  for (let tick = 0; tick * every <= end * .97; tick += 1) {
    svg.append(s("text", {x: x(tick * every), y: height + 17, "text-anchor": tick ? "middle" : "start"}, seconds(tick * every)));
  }
  $("timeline").replaceChildren(svg);
}

function drawRewards() {
  const rows = [...run.rows.values()].filter((row) => row.reward != null);
  $("rewards").parentElement.hidden = !rows.length;
  const width = Math.max(220, $("rewards").clientWidth), height = 120, base = height - 22, values = rows.map((row) => row.reward);
  run.unit = values.every((value) => value >= 0 && value <= 1);
  const low = run.unit ? 0 : Math.min(...values), high = run.unit ? 1 : Math.max(...values, low + 1e-9);
  const x = (value) => 10 + (width - 20) * (value - low) / (high - low || 1);
  const svg = s("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Distribution of the rewards"});
  svg.append(s("line", {x1: 4, x2: width - 4, y1: base, y2: base, class: "axis"}));
  [[low, "start"], [(low + high) / 2, "middle"], [high, "end"]].forEach(([value, anchor]) =>
    svg.append(s("text", {x: anchor === "start" ? 4 : anchor === "end" ? width - 4 : x(value), y: height - 5, "text-anchor": anchor}, number(value, 2))));
  const stacks = new Map(), radius = rows.length > 32 ? 4 : 6.5;
  for (const row of [...rows].sort((a, b) => a.index - b.index)) {
    const bin = Math.round(x(row.reward) / (radius * 1.7));
    const level = stacks.get(bin) || 0;
    stacks.set(bin, level + 1);
    const dot = s("circle", {cx: x(row.reward), cy: Math.max(radius, base - radius - 2 - level * radius * 1.9), r: radius, class: row.index === run.best ? "dot best" : "dot"});
    dot.append(s("title", {}, `candidate ${row.index}: ${number(row.reward)}`));
    svg.append(dot);
  }
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  if (values.length > 1) svg.append(s("line", {x1: x(mean), x2: x(mean), y1: 4, y2: base, class: "mean"}));
  $("rewards").replaceChildren(svg);
  const longest = [...run.rows.values()].reduce((a, b) => ((b.text || "").length > (a.text || "").length ? b : a));
  const other = run.over && longest.text !== run.rows.get(run.best)?.text;
  $("gain").textContent = `best ${number(Math.max(...values))}, mean ${number(mean)} (dashed), gain ${number(Math.max(...values) - mean)}; ${rows.length} of ${run.n} have a reward`
      + (run.over ? `; the longest ${other ? `would have been candidate ${longest.index}, ${longest.reward == null ? "without a reward" : number(longest.reward)}` : "is the winner"}` : "");
}

function draw() {
  drawRewards();   // first: it finds out whether rewards lie between 0 and 1
  drawTimeline();
  if (run.over) drawCards();
  else drawLive();
}

// Two scorers on the same candidates.
function drawCompared(names, [one, two]) {
  const both = one.candidates.filter((row) => row.text === two.candidates[row.index]?.text);
  const cell = (about, row) => h("td", {class: about.best === row.index ? "picked" : ""},
    row.reward != null ? number(row.reward) : row.upper_bound != null ? `≤ ${number(row.upper_bound)}` : row.status);
  const seen = new Map(both.map((row) => [row.text, row]).reverse()), rank = (row) => row.reward ?? -Infinity;
  const lines = [...seen.values()].sort((a, b) => rank(b) - rank(a));
  const picks = [one, two].map((about) => (about.best == null ? "nothing" : `candidate ${about.best}`));
  $("compared").replaceChildren(h("h2", {}, "Two scorers"), ...(both.length < one.candidates.length
    ? [h("p", {}, "The policy wrote other answers to the same seed, so rewards of the two scorers cannot be set side by side.")]
    : [h("p", {}, picks[0] === picks[1] ? `Both pick ${picks[0]}.` : `${names[0]} picks ${picks[0]}, ${names[1]} picks ${picks[1]}.`),
      h("div", {class: "scroll", tabindex: "0"}, h("table", {}, h("tr", {}, ...["", ...names, "text"].map((name) => h("th", {}, name))),
        ...lines.map((row) => h("tr", {}, h("td", {}, row.index), cell(one, row), cell(two, two.candidates[row.index]), h("td", {}, (row.text || "no text").slice(0, 160))))))]));
  $("compared").hidden = false;
}
