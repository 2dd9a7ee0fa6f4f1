// The page of `doge-deploy serve`. Text of a model or a user goes in by textContent only.
"use strict";

const $ = (id) => document.getElementById(id);
const conversation = [];
let running = null;
let chat = Date.now();
let models = [];

const OPTIONS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function showError(place, message) {
  place.textContent = message;
  place.hidden = !message;
}

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

// Views

function open(name) {
  for (const view of ["chat", "server", "about"]) {
    const tab = $(`tab-${view}`);
    $(view).hidden = view !== name;
    tab.setAttribute("aria-selected", String(view === name));
    tab.tabIndex = view === name ? 0 : -1;
  }
  if (name === "server") poll();
  if (name === "about") showModels();
}

for (const tab of document.querySelectorAll("[role=tab]")) {
  tab.addEventListener("click", () => open(tab.id.slice(4)));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const tabs = [...document.querySelectorAll("[role=tab]")];
    const next = tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length];
    next.focus();
    open(next.id.slice(4));
  });
}

// Chat

function addMessage(role, content) {
  $("empty")?.remove();
  const box = element("div", `message ${role}`);
  box.append(element("p", "who", { user: "You", assistant: "Doge", system: "System" }[role] ?? role));
  const text = element("p", "text", content);
  box.append(text);
  $("messages").append(box);
  box.scrollIntoView({ block: "end" });
  return text;
}

function setBusy(busy) {
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  const said = conversation.some((message) => message.role === "user");
  $("regenerate").disabled = busy || !said;
  for (const id of ["clear", "export"]) $(id).disabled = busy || !conversation.length;
}

function body() {
  const system = $("system").value.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...conversation];
  const asked = { model: $("model").value, messages, stream: true, stream_options: { include_usage: true } };
  for (const name of OPTIONS) {
    const value = $(name).value;
    if (value !== "") asked[name] = Number(value);
  }
  return asked;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function answer() {
  showError($("error"), "");
  running = new AbortController();
  setBusy(true);
  const place = addMessage("assistant", "");
  const start = performance.now();
  let first = null, tokens = 0, text = "", ended = "";
  const figures = () => {
    const now = performance.now();
    const parts = [];
    if (first !== null) parts.push(`first token after ${Math.round(first - start)} ms`);
    if (tokens > 1) parts.push(`${((tokens - 1) / ((now - first) / 1000)).toFixed(1)} tokens/s`);
    if (tokens) parts.push(`${tokens} tokens`);
    if (ended === "length") parts.push("ended at its longest");
    if (ended === "stopped") parts.push("stopped");
    $("figures").textContent = parts.join(" · ");
  };
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(body()), signal: running.signal,
    });
    if (!response.ok) throw new Error(await failure(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) tokens = event.usage.completion_tokens;
      const choice = event.choices[0];
      if (!choice) continue;
      if (choice.delta.content) {
        first ??= performance.now();
        if (!event.usage) tokens += 1;
        text += choice.delta.content;
        place.textContent = text;
        place.parentElement.scrollIntoView({ block: "end" });
      }
      if (choice.finish_reason) ended = choice.finish_reason;
      figures();
    }
  } catch (error) {
    if (error.name === "AbortError") ended = "stopped";
    else showError($("error"), error.message);
  }
  figures();
  if (text) conversation.push({ role: "assistant", content: text });
  else place.parentElement.remove();
  keep();
  running = null;
  setBusy(false);
  $("input").focus();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("input").value.trim();
  if (!text || running) return;
  $("input").value = "";
  conversation.push({ role: "user", content: text });
  addMessage("user", text);
  answer();
});

$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
  if (event.key === "Escape") running?.abort();
});

$("stop").addEventListener("click", () => running?.abort());

$("regenerate").addEventListener("click", () => {
  if (conversation.at(-1)?.role === "assistant") {
    conversation.pop();
    $("messages").lastElementChild.remove();
  }
  answer();
});

function begin(id, messages) {
  chat = id;
  conversation.splice(0, conversation.length, ...messages);
  $("messages").replaceChildren();
  for (const message of messages) addMessage(message.role, message.content);
  if (!messages.length) {
    $("messages").append(element("p", "empty", "Write a message to begin."));
    $("messages").firstElementChild.id = "empty";
  }
  $("figures").textContent = "";
  showError($("error"), "");
  setBusy(false);
  $("input").focus();
}

$("clear").addEventListener("click", () => begin(Date.now(), []));

$("export").addEventListener("click", () => {
  const data = JSON.stringify({ model: $("model").value, messages: conversation }, null, 2);
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([data], { type: "application/json" }));
  link.download = "conversation.json";
  link.click();
  URL.revokeObjectURL(link.href);
});

// Earlier chats: in this browser alone, and none where it keeps nothing

const KEPT = "doge-deploy chats";
const MOST_KEPT = 30;

function kept() {
  try {
    return JSON.parse(localStorage.getItem(KEPT)) ?? [];
  } catch {
    return [];
  }
}

function store(chats) {
  try {
    localStorage.setItem(KEPT, JSON.stringify(chats));
  } catch { /* it is full or forbidden: the chat goes on */ }
  showEarlier();
}

function keep() {
  if (!conversation.length) return;
  const others = kept().filter((one) => one.id !== chat);
  store([{ id: chat, messages: [...conversation] }, ...others].slice(0, MOST_KEPT));
}

function showEarlier() {
  const chats = kept();
  $("earlier").hidden = !chats.length;
  $("history").replaceChildren(...chats.map((one) => {
    const item = element("li");
    const said = one.messages.find((message) => message.role === "user")?.content ?? "";
    const button = element("button", "", said.slice(0, 60) || "Chat");
    button.type = "button";
    button.addEventListener("click", () => { if (!running) begin(one.id, one.messages); });
    item.append(button);
    return item;
  }));
}

$("forget").addEventListener("click", () => store([]));

// Server

const flights = [];
const SPAN = 60;

function parse(text) {
  const found = [];
  for (const line of text.split("\n")) {
    const match = /^(\w+)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!match) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) labels[name] = value;
    found.push({ name: match[1], labels, value: Number(match[3]) });
  }
  return found;
}

function quantile(samples, name, share) {
  const buckets = new Map();
  for (const sample of samples) {
    if (sample.name !== `${name}_bucket`) continue;
    const limit = sample.labels.le === "+Inf" ? Infinity : Number(sample.labels.le);
    buckets.set(limit, (buckets.get(limit) ?? 0) + sample.value);
  }
  const sorted = [...buckets].sort((a, b) => a[0] - b[0]);
  const total = sorted.at(-1)?.[1] ?? 0;
  if (!total) return ["–", 0];
  const limit = sorted.find(([, count]) => count >= share * total)[0];
  if (limit === Infinity) return ["over 60 s", total];
  return [limit < 1 ? `${limit * 1000} ms` : `${limit} s`, total];
}

async function poll() {
  if ($("server").hidden) return;
  try {
    const [answered, ready] = await Promise.all([fetch("/metrics", { headers: headers() }), fetch("/ready")]);
    if (!answered.ok) throw new Error(await failure(answered));
    const samples = parse(await answered.text());
    const sum = (name) => samples.filter((one) => one.name === `doge_${name}`).reduce((a, one) => a + one.value, 0);
    const time = performance.now();
    flights.push({
      time, running: sum("num_requests_running"), waiting: sum("num_requests_waiting"),
      tokens: sum("generation_tokens_total"),
    });
    if (flights.length > SPAN) flights.shift();
    const now = flights.at(-1), before = flights.at(-2);
    const rate = before ? (now.tokens - before.tokens) / ((now.time - before.time) / 1000) : 0;
    const queries = sum("prefix_cache_queries_total"), drafts = sum("spec_draft_tokens_total");
    const share = (part, whole) => (whole ? `${Math.round((100 * part) / whole)} %` : "–");
    showTiles([
      [(await ready.json()).status, "state"],
      [`${now.running} of ${sum("num_slots")}`, "slots in use"],
      [now.waiting, "waiting"],
      [rate.toFixed(1), "tokens/s"],
      [`${Math.round(100 * sum("kv_cache_usage_perc"))} %`, "cache in use"],
      [share(sum("prefix_cache_hits_total"), queries), "of prompts reused"],
      [share(sum("spec_accepted_tokens_total"), drafts), "of drafts accepted"],
      [now.tokens, "tokens so far"],
    ]);
    draw();
    showSlots(samples);
    showTimes(samples);
    showError($("server-error"), "");
  } catch (error) {
    showError($("server-error"), `no figures: ${error.message}`);
  }
  clearTimeout(poll.timer);
  poll.timer = setTimeout(poll, 2000);
}

function showTiles(rows) {
  $("tiles").replaceChildren(...rows.map(([value, name]) => {
    const tile = element("div", "tile");
    tile.append(element("b", "", String(value)), element("span", "", name));
    return tile;
  }));
}

function showSlots(samples) {
  const most = Object.fromEntries(models.map((model) => [model.id, model.max_model_len]));
  const slots = samples.filter((one) => one.name === "doge_slot_tokens");
  $("slots").replaceChildren(...slots.map((one) => {
    const busy = one.labels.busy === "true";
    const room = most[one.labels.model_name] ?? one.value;
    const box = element("div", `slot${busy ? " busy" : ""}`);
    box.setAttribute("role", "listitem");
    const state = busy ? "in use" : one.value ? "kept" : "empty";
    box.append(element("span", "", `${Number(one.labels.slot) + 1}`));
    const bar = document.createElement("meter");
    bar.max = room || 1;
    bar.value = one.value;
    box.append(bar, element("span", "", `${one.value} of ${room} tokens, ${state}`));
    return box;
  }));
}

function showTimes(samples) {
  const rows = [
    ["Time to first token", "doge_time_to_first_token_seconds"], ["Between two tokens", "doge_inter_token_latency_seconds"],
    ["Whole request", "doge_e2e_request_latency_seconds"], ["In the queue", "doge_request_queue_time_seconds"],
  ];
  $("times").tBodies[0].replaceChildren(...rows.map(([title, name]) => {
    const row = element("tr");
    const [median, total] = quantile(samples, name, 0.5);
    for (const text of [title, median, quantile(samples, name, 0.95)[0], total]) row.append(element("td", "", String(text)));
    return row;
  }));
}

function draw() {
  const top = Math.max(1, ...flights.map((one) => Math.max(one.running, one.waiting)));
  const path = (name) => flights.map((one, index) => {
    const x = 600 - (flights.length - 1 - index) * (600 / (SPAN - 1));
    return `${index ? "L" : "M"}${x.toFixed(1)} ${(132 - (124 * one[name]) / top).toFixed(1)}`;
  }).join("");
  $("chart").replaceChildren(...["waiting", "running"].map((name) => {
    const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
    line.setAttribute("class", name);
    line.setAttribute("d", path(name));
    return line;
  }));
  $("height").textContent = `The height of the drawing is ${top}.`;
}

// Models

async function loadModels() {
  try {
    const response = await fetch("/v1/models", { headers: headers() });
    if (!response.ok) throw new Error(await failure(response));
    models = (await response.json()).data;
    const chosen = $("model").value;
    const texts = models.filter((model) => model.doge_deploy.task === "causal-lm");
    $("model").replaceChildren(...texts.map((model) => new Option(model.id, model.id)));
    if (chosen) $("model").value = chosen;
    showError($("error"), "");
  } catch (error) {
    showError($("error"), error.message);
  }
}

// What was found when the bundle was judged at the start.
function verified(report) {
  if (!report) return element("p", "", "Not judged at this start; --verify-on-start FILE does it.");
  const part = element("details");
  part.append(element("summary", "", `Verified: ${report.verdict}`), element("p", "", `Judged by ${report.recording}.`));
  const table = element("table");
  for (const one of report.cases) {
    const row = element("tr");
    row.append(element("td", "", one.case), element("td", "", `${(100 * one.load).toFixed(1)} % of its tolerance`));
    table.append(row);
  }
  part.append(table);
  return part;
}

function showModels() {
  $("base").textContent = `${location.origin}/v1`;
  $("cards").replaceChildren(...models.map((model) => {
    const card = element("div", "card");
    card.append(element("h2", "", model.id));
    const facts = model.doge_deploy;
    const rows = [
      ["Task", facts.task], ["Numbers", facts.dtype], ["Weights", facts.weights],
      ["Tokens", `at most ${model.max_model_len}`],
      ["Runs on", [facts.backend, facts.engine && `engine ${facts.engine}`, facts.threads && `${facts.threads} threads`]
        .filter(Boolean).join(", ")],
      ["Cache", facts.layouts.join(", ")], ["Lowered for", facts.lowered.join(", ") || "nothing: the standard graph"],
      ["Checkpoint", facts.checkpoint.source ?? "a directory"], ["sha256", facts.checkpoint.sha256],
      ["Exported by", `${facts.tool.name} ${facts.tool.version}`], ["Warnings", facts.warnings.join("; ") || "none"],
    ];
    const table = element("table");
    for (const [name, value] of rows.filter(([, value]) => value)) {
      const row = element("tr");
      row.append(element("td", "", name), element("td", "", String(value)));
      table.append(row);
    }
    card.append(table, verified(facts.verified));
    return card;
  }));
}

$("key").addEventListener("change", loadModels);
loadModels();
showEarlier();
$("input").focus();
