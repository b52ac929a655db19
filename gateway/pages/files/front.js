// The page at `/`: whether it can serve, what it serves, how to use it, and a place to try it. It knows what anybody may ask the API, and with
// a key what the key's holder may; the key is in this variable and nowhere else.
import {by, duration, el, events, number, problem, say} from "./common.js";

const base = new URL("v1", document.baseURI).href;
const LOOK_AGAIN_MS = 1500;
const STILL_WELL_MS = 10000;
let key = "";
let wanted = false;

const authorized = () => (key ? {authorization: `Bearer ${key}`} : {});

async function look() {
  let ready = false;
  try {
    const answer = await fetch("readyz");
    ready = answer.ok;
    const words = ready ? "Ready" : await problem(answer);
    const percent = ready ? null : /(\d+) %/.exec(words);
    say(by("state"), words);
    by("state").className = ready ? "good" : "warn";
    by("progress").hidden = ready;
    if (percent) by("progress").value = Number(percent[1]);
    else by("progress").removeAttribute("value");
  } catch {
    say(by("state"), "The gateway does not answer.");
    by("state").className = "bad";
  }
  setTimeout(look, ready ? STILL_WELL_MS : LOOK_AGAIN_MS);
}

async function showModels() {
  if (/[^!-~]/.test(key)) { // no header could carry it
    key = "";
    say(by("key-problem"), "This is no key: keys are made of ASCII characters without spaces.");
    return;
  }
  let models = [];
  let answer = null;
  try {
    answer = await fetch("v1/models", {headers: authorized()});
    if (answer.ok) models = (await answer.json()).data;
  } catch {
    say(by("no-models"), "The gateway does not answer; load the page again when it does.");
    return;
  }
  wanted ||= answer.status === 401;
  by("key-form").hidden = !wanted;
  say(by("key-problem"), answer.ok || !key ? "" : await problem(answer));
  say(by("no-models"), models.length ? "" : answer.status === 401 ? "They are shown to who has a key." : "This key may use none.");
  by("models").replaceChildren(...models.map((model) => el("li", {}, el("code", {}, model.id), length(model))));
  const chosen = by("model").value;
  by("model").replaceChildren(...models.map((model) => el("option", {value: model.id}, model.id)));
  if (models.some((model) => model.id === chosen)) by("model").value = chosen;
  by("send").disabled = !models.length;
  showExamples();
}

function length(model) {
  return model.context_length ? ` ${number(model.context_length)} tokens of context` : "";
}

function showExamples() {
  const model = by("model").value || "MODEL";
  const body = JSON.stringify({model, messages: [{role: "user", content: "Hello"}], max_tokens: 32});
  const sent = wanted ? "YOUR_KEY" : "none";
  say(by("base-url"), base);
  say(by("curl"), [
    `curl ${base}/chat/completions -H 'Authorization: Bearer ${sent}' -H 'Content-Type: application/json' \\`,
    `  -d '${body.replaceAll("'", "'\\''")}'`,
  ].join("\n"));
  say(by("python"), [
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(base)}, api_key=${JSON.stringify(sent)})`,
    "stream = client.chat.completions.create(",
    `    model=${JSON.stringify(model)}, messages=[{"role": "user", "content": "Hello"}], max_tokens=32, stream=True`,
    ")",
    "for chunk in stream:",
    '    print(chunk.choices[0].delta.content or "", end="", flush=True)',
  ].join("\n"));
}

async function copy(id) {
  try {
    await navigator.clipboard.writeText(by(id).textContent);
    say(by("copied"), "Copied.");
  } catch {
    // Only a page of https or of this machine may write to the clipboard.
    getSelection().selectAllChildren(by(id));
    say(by("copied"), "It is selected: copy it with Ctrl+C.");
  }
}

let running = null;

async function send() {
  running?.abort();
  const mine = (running = new AbortController());
  by("stop").disabled = false;
  by("text").textContent = by("thinking").textContent = "";
  by("outcome").className = "";
  say(by("outcome"), "Waiting for the first token…");
  try {
    say(by("outcome"), await stream(mine.signal));
  } catch (error) {
    if (mine !== running) return; // another one was sent meanwhile
    const stopped = error.name === "AbortError";
    by("outcome").className = stopped ? "faint" : "bad";
    say(by("outcome"), stopped ? "Stopped." : error.message);
  }
  by("stop").disabled = true;
}

/** Show an answer as it comes; returns how it went in words. */
async function stream(signal) {
  const began = performance.now();
  const answer = await fetch("v1/chat/completions", {
    method: "POST",
    headers: {"content-type": "application/json", ...authorized()},
    body: JSON.stringify({
      model: by("model").value,
      messages: [{role: "user", content: by("prompt").value}],
      max_tokens: Number(by("max-tokens").value),
      stream: true,
      stream_options: {include_usage: true},
    }),
    signal,
  });
  const id = answer.headers.get("x-request-id");
  if (!answer.ok) throw new Error(`${await problem(answer)} (request ${id})`);
  let first = null;
  let usage = null;
  let reason = null;
  for await (const {data} of events(answer)) {
    if (data === "[DONE]") {
      const tokens = usage ? `${number(usage.completion_tokens)} tokens, ` : "";
      return `${tokens}first after ${duration(first)}, all in ${duration(performance.now() - began)}; ended by ${reason}; request ${id}`;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(`${chunk.error.message} (request ${id})`);
    usage = chunk.usage ?? usage;
    for (const {delta, finish_reason} of chunk.choices ?? []) {
      reason = finish_reason ?? reason;
      if (delta.reasoning_content) by("thinking").append(delta.reasoning_content);
      if (delta.content) by("text").append(delta.content);
      if (first === null && (delta.content || delta.reasoning_content)) {
        first = performance.now() - began;
        say(by("outcome"), "Answering…");
      }
    }
  }
  throw new Error(`The answer broke off (request ${id}).`);
}

by("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = by("key").value.trim();
  showModels();
});
by("playground").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
by("stop").addEventListener("click", () => running?.abort());
by("model").addEventListener("change", showExamples);
for (const id of ["curl", "python"]) by(`copy-${id}`).addEventListener("click", () => copy(id));

showExamples();
showModels();
look();
