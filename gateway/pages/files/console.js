// The operator's console. It shows what the admin API says and nothing else, asked with the operator's own key, which is in this variable, and
// in the tab's session storage where the operator wants that.
import {by, duration, events, fill, number, problem, say} from "./common.js";
import {story} from "./timeline.js";

const KEPT = "penstock admin key";
const SHOWN = 50;
const FIRST_RETRY_MS = 500;
const LAST_RETRY_MS = 5000;
// States of a host that are well, and those that somebody wants so or that end by themselves; all others are bad.
const GOOD = ["ok"];
const PASSING = ["full", "probation", "draining", "drained"];

let key = "";
let operator = {name: "", role: ""};
let hosts = [];
let keys = [];
let usage = [];
// What each key had used, by the monotonic time in seconds of the look before the last one.
let before = {at: 0, used: {}};
let rates = {};
let following = null;

function ask(path, more = {}) {
  return fetch(path, {...more, headers: {authorization: `Bearer ${key}`, ...more.headers}, cache: "no-store"});
}

// Signing in and out

async function signIn(given) {
  if (/[^!-~]/.test(given)) return signOut("This is not an admin key of this gateway."); // no header could carry it
  key = given;
  say(by("login-problem"), "");
  let answer;
  try {
    answer = await ask("admin/operator");
  } catch {
    return signOut("The gateway does not answer.");
  }
  if (!answer.ok) return signOut(answer.status === 401 ? "This is not an admin key of this gateway." : await problem(answer));
  operator = await answer.json();
  const changes = operator.role === "all";
  say(by("role"), `Signed in as '${operator.name}', role '${operator.role}'`
    + (changes ? "." : ": everything is shown; draining hosts wants a key with the role 'all'."));
  by("login").hidden = true;
  by("console").hidden = by("leave").hidden = false;
  by("key").value = "";
  follow();
  openNamed();
}

function signOut(why) {
  key = "";
  sessionStorage.removeItem(KEPT);
  following?.abort();
  following = null;
  by("console").hidden = by("leave").hidden = true;
  by("login").hidden = false;
  say(by("login-problem"), why);
  say(by("state"), "");
  say(by("live"), "");
  by("key").focus();
}

// What changes

async function follow() {
  following?.abort();
  const mine = (following = new AbortController());
  before = {at: 0, used: {}};
  let retry = FIRST_RETRY_MS;
  const query = new URLSearchParams({state: by("which").value, last: SHOWN});
  if (by("of-key").value) query.set("key", by("of-key").value);
  while (following === mine) {
    try {
      const answer = await ask(`admin/events?${query}`, {signal: mine.signal});
      if (answer.status === 401 || answer.status === 403) return signOut(await problem(answer));
      if (!answer.ok) throw new Error(await problem(answer));
      retry = FIRST_RETRY_MS;
      say(by("live"), "live");
      for await (const {event, data} of events(answer)) {
        if (following === mine) take(event, JSON.parse(data));
      }
    } catch (error) {
      if (following !== mine) return;
      say(by("live"), `not live: ${error.message}`);
    }
    await new Promise((done) => setTimeout(done, retry));
    retry = Math.min(2 * retry, LAST_RETRY_MS);
    if (following === mine) say(by("live"), "asking again…");
  }
}

const taken = {
  ready(found) {
    by("state").className = found.error ? "bad" : "good";
    say(by("state"), found.error ? found.error.message : "ready");
  },
  workers(found) {
    const rows = found.workers ?? [];
    const open = rows.reduce((sum, row) => sum + row.open, 0);
    const oldest = Math.max(0, ...rows.map((row) => row.oldest_s));
    const serving = rows.filter((row) => row.state === "serving").length;
    say(by("workers"), `${serving} of ${rows.length} workers serve; ${open} requests open${open ? `, the oldest for ${duration(oldest * 1000)}` : ""}`);
  },
  hosts(found) {
    hosts = found.hosts ?? [];
    fill(by("hosts"), HOSTS, hosts, (row) => `${row.backend} ${row.id}`);
  },
  requests(found) {
    const rows = found.requests ?? [];
    fill(by("requests"), REQUESTS, rows, (row) => `${row.id} ${row.request_id} ${row.at}`);
    by("requests").hidden = !rows.length;
    say(by("none"), found.error ? found.error.message : rows.length ? "" : "None.");
  },
  keys(found) {
    keys = found.keys ?? [];
    say(by("keys-problem"), found.error ? found.error.message : "");
    const names = new Set([...by("of-key").options].map((option) => option.value));
    for (const {name} of keys) if (!names.has(name)) by("of-key").add(new Option(name, name));
    showKeys();
  },
  usage(found) {
    usage = found.usage ?? [];
    const at = performance.now() / 1000;
    const used = Object.fromEntries(usage.map((row) => [row.key, {requests: row.requests, tokens: row.prompt_tokens + row.generated_tokens}]));
    rates = before.at ? Object.fromEntries(Object.entries(used).map(([name, now]) => {
      const then = before.used[name] ?? {requests: 0, tokens: 0};
      const passed = at - before.at;
      return [name, {requests: Math.max(now.requests - then.requests, 0) / passed, tokens: Math.max(now.tokens - then.tokens, 0) / passed}];
    })) : {};
    before = {at, used};
    showKeys();
  },
};

function take(event, found) {
  taken[event]?.(found);
}

// Hosts

const HOSTS = [
  {title: "host", text: (row) => row.id},
  {title: "backend", text: (row) => row.backend},
  {
    title: "state",
    control: (cell, row) => {
      cell.className = GOOD.includes(row.state) ? "good-state" : PASSING.includes(row.state) ? "warn-state" : "bad-state";
      say(cell, row.state);
    },
  },
  {title: "in flight", number: true, text: (row) => number(row.in_flight) + (row.capacity === null ? "" : ` of ${number(row.capacity)}`)},
  {title: "running", number: true, text: (row) => number(row.stats?.running_requests)},
  {title: "queued", number: true, text: (row) => number(row.stats?.queued_requests)},
  {title: "KV cache", number: true, text: (row) => percent(row.stats?.kv_usage_ratio)},
  {title: "tokens/s", number: true, text: (row) => number(row.stats?.generation_tokens_per_second)},
  {title: "why", text: (row) => row.why},
  {
    title: "",
    control: (cell, row) => {
      const out = row.state === "draining" || row.state === "drained";
      let button = cell.firstChild;
      if (!button) {
        button = document.createElement("button");
        button.type = "button";
        button.addEventListener("click", () => drain(button.dataset.host, button.dataset.verb));
        cell.append(button);
      }
      button.dataset.host = row.id;
      button.dataset.verb = out ? "undrain" : "drain";
      button.disabled = operator.role !== "all";
      button.setAttribute("aria-label", `${out ? "Undrain" : "Drain"} ${row.id}`);
      if (button.disabled) button.setAttribute("aria-describedby", "role");
      say(button, out ? "Undrain" : "Drain");
    },
  },
];

const percent = (ratio) => (ratio === null || ratio === undefined ? "" : `${number(100 * ratio)} %`);

async function drain(host, verb) {
  const mine = hosts.filter((row) => row.id === host).map((row) => row.backend);
  const others = hosts.some((row) => row.id !== host && mine.includes(row.backend) && (row.state === "ok" || row.state === "full"));
  if (verb === "drain" && !others && !confirm(`${host} is the last host that takes requests: without it they are refused. Drain it?`)) return;
  by("done").className = "";
  try {
    const path = `admin/hosts/${encodeURIComponent(host)}/${verb}`;
    const answer = await ask(path, {method: "POST", headers: {"content-type": "application/json"}, body: "{}"});
    if (!answer.ok) throw new Error(await problem(answer));
    taken.hosts(await answer.json());
    say(by("done"), verb === "drain" ? `${host} gets no new requests; what it works on goes on.` : `${host} gets requests again.`);
  } catch (error) {
    by("done").className = "bad";
    say(by("done"), error.message);
  }
}

// Requests

const REQUESTS = [
  {
    title: "id",
    control: (cell, row) => {
      const id = row.id || row.request_id;
      if (row.outcome === "open") return say(cell, id); // it is explained when it has ended
      let link = cell.querySelector("button");
      if (!link) {
        link = document.createElement("button");
        link.type = "button";
        link.className = "link mono";
        link.addEventListener("click", () => { location.hash = `request=${encodeURIComponent(link.textContent)}`; });
        cell.replaceChildren(link);
      }
      say(link, id);
    },
  },
  {title: "at", text: (row) => row.at.slice(11, 23)},
  {title: "key", text: (row) => row.key},
  {title: "model", text: (row) => row.model},
  {title: "host", text: (row) => row.host + (row.tried > 1 ? ` (attempt ${row.tried})` : "")},
  {title: "time", number: true, text: (row) => duration(row.ms)},
  {title: "first event", number: true, text: (row) => duration(row.first_event_ms)},
  {title: "tokens", number: true, text: (row) => number(row.completion_tokens)},
  {title: "how", text: (row) => (row.outcome === "open" ? `open: ${row.why}` : `${row.status || ""} ${row.outcome}: ${row.verdict}`)},
];

async function explain(id) {
  by("explained").hidden = false;
  say(by("explained-title"), `Request ${id}`);
  by("story").replaceChildren("asking…");
  try {
    const answer = await ask(`admin/requests/${encodeURIComponent(id)}`);
    if (!answer.ok) throw new Error(await problem(answer));
    by("story").replaceChildren(...story(await answer.json()));
  } catch (error) {
    by("story").replaceChildren(error.message);
  }
  by("explained-title").focus();
}

/** The request that the address names: so it can be gone back to, and sent to a colleague. */
function openNamed() {
  const id = new URLSearchParams(location.hash.slice(1)).get("request");
  if (id && key) explain(id);
  else by("explained").hidden = true;
}

// Keys

const KEYS = [
  {title: "key", text: (row) => row.name || "(none)"},
  {title: "from", text: (row) => row.problem ?? row.origin ?? ""},
  {title: "requests/s", number: true, text: (row) => number(row.rate?.requests, 1)},
  {title: "tokens/s", number: true, text: (row) => number(row.rate?.tokens)},
  {title: "of rpm", number: true, text: (row) => share(row.rate?.requests, row.rpm)},
  {title: "of tpm", number: true, text: (row) => share(row.rate?.tokens, row.tpm)},
  {title: "requests today", number: true, text: (row) => number(row.used?.requests ?? 0)},
  {title: "refused by limits", number: true, text: (row) => number(row.used?.limited ?? 0)},
  {title: "tokens today", number: true, text: (row) => number(row.used ? row.used.prompt_tokens + row.used.generated_tokens : 0)},
  {title: "cost today", number: true, text: (row) => number(row.used?.cost ?? 0, 4)},
  {title: "may", text: may},
];

const share = (per_s, limit) => (limit && per_s !== undefined ? percent((per_s * 60) / limit) : "");

function may(row) {
  const told = ["name", "origin", "created", "problem", "rate", "used"];
  return Object.entries(row)
    .filter(([name, value]) => !told.includes(name) && value !== 0)
    .map(([name, value]) => `${name} ${typeof value === "object" ? JSON.stringify(value) : value}`)
    .join(", ");
}

function showKeys() {
  const used = new Map(usage.map((row) => [row.key, row]));
  const named = new Map(keys.map((row) => [row.name, row]));
  const names = [...new Set([...named.keys(), ...used.keys()])];
  const rows = names.map((name) => ({name, ...named.get(name), used: used.get(name), rate: rates[name]}));
  fill(by("keys"), KEYS, rows, (row) => row.name);
  by("keys").hidden = !rows.length;
}

by("login").addEventListener("submit", async (event) => {
  event.preventDefault();
  const given = by("key").value.trim();
  await signIn(given);
  if (key && by("keep").checked) sessionStorage.setItem(KEPT, given);
});
by("leave").addEventListener("click", () => signOut(""));
by("which").addEventListener("change", follow);
by("of-key").addEventListener("change", follow);
by("filter").addEventListener("submit", (event) => {
  event.preventDefault();
  const id = by("find").value.trim();
  if (id) location.hash = `request=${encodeURIComponent(id)}`;
});
by("close").addEventListener("click", () => {
  location.hash = "";
  by("requests-title").focus();
});
addEventListener("hashchange", openNamed);
// A tab that nobody looks at asks nothing: a browser has six connections for all its tabs of one address, and the gateway has better to do.
document.addEventListener("visibilitychange", () => {
  if (!key) return;
  if (document.hidden) {
    following?.abort();
    following = null;
    say(by("live"), "paused");
  } else {
    follow();
  }
});

if (sessionStorage.getItem(KEPT)) signIn(sessionStorage.getItem(KEPT));
else by("login").hidden = false;
