// One request as `GET /admin/requests/ID` tells of it, drawn: where its time went, and each attempt at a host.
import {duration, el, fill, number} from "./common.js";

const PHASES = {
  read: "reading the request",
  limits: "deciding limits",
  queue: "waiting for a host",
  retry: "attempts that failed",
  connect: "connecting",
  first_token: "engine: queue and prefill",
  generate: "engine: generating",
  answer: "engine: the whole answer",
  client: "waiting for the client to read",
};

/** What there is to show of it, as elements. */
export function story(found) {
  const whole = Math.max(found.ms, 0.01);
  const tokens = found.prompt_tokens === null ? "" :
    `${number(found.prompt_tokens)} prompt (${number(found.cached_tokens ?? 0)} cached) and ${number(found.completion_tokens)} completion tokens`
    + (found.finish_reasons.length ? `, ended by ${found.finish_reasons.join(", ")}` : "");
  const parts = [
    el("p", {id: "verdict"}, el("strong", {}, found.verdict || found.outcome)),
    el("p", {}, `${found.method} ${found.path} for ${found.model || "no model"}${found.stream ? ", streamed" : ""}: `
      + `${found.status} ${found.outcome}, ${duration(found.ms)} in all`),
    el("p", {class: "faint"}, `${found.at} from ${found.client}, key ${found.key || "none"}, bound by ${found.affinity || "nothing"}; `
      + `id ${found.id || "none"}, request id ${found.request_id}, trace ${found.trace_id}`),
    tokens && el("p", {}, tokens),
    el("h3", {}, "Timeline"),
    el("p", {class: "faint legend"}, `from 0 to ${duration(found.ms)}; striped until the first event, solid after it`),
    ...found.attempts.flatMap((attempt, place) => drawn(attempt, place, found, whole)),
    found.attempts.length ? null : el("p", {}, "No host was asked."),
    el("h3", {}, "Where its time went"),
    phases(found, whole),
  ];
  if (found.limits.length) parts.push(el("h3", {}, "Limits"), limits(found.limits));
  if (found.also?.length) parts.push(el("p", {class: "faint"}, `Other requests of the same request id: ${found.also.join(", ")}`));
  return parts.filter(Boolean);
}

function drawn(attempt, place, found, whole) {
  const next = found.attempts[place + 1]?.began_ms;
  const end = attempt.ended_ms ?? next ?? attempt.first_event_ms ?? attempt.began_ms;
  const first = attempt.first_event_ms ?? end;
  const words = `attempt ${place + 1}${attempt.continues ? " goes on" : ""} at ${attempt.host}: ${attempt.result}; `
    + `${duration(attempt.began_ms)} to ${duration(end)}`
    + (attempt.first_event_ms === null ? ", no event" : `, first event after ${duration(attempt.first_event_ms)}`);
  const track = el("div", {class: "track", role: "img", "aria-label": words});
  bar(track, attempt.result === "ok" || attempt.first_event_ms !== null ? "bar wait" : "bar broken", attempt.began_ms, first, whole);
  if (attempt.first_event_ms !== null) {
    bar(track, attempt.result === "ok" ? "bar" : "bar broken", first, end, whole);
    bar(track, "mark", first, first, whole);
  }
  const considered = el("table", {"aria-label": `hosts considered for attempt ${place + 1}`});
  fill(considered, [{title: "host", text: (row) => row[0]}, {title: "as it stood", text: (row) => row[1]}], attempt.considered, (row) => row[0]);
  return [
    el("p", {class: "attempt"}, words),
    track,
    attempt.considered.length ? el("details", {}, el("summary", {}, "hosts that were considered"), considered) : null,
  ];
}

function bar(track, kind, from, to, whole) {
  const made = el("div", {class: kind});
  made.style.left = `${(100 * from) / whole}%`;
  if (to > from) made.style.width = `${(100 * (to - from)) / whole}%`;
  track.append(made);
}

function phases(found, whole) {
  const table = el("table", {class: "phases", "aria-label": "where its time went"});
  const columns = [
    {title: "phase", text: ([name]) => PHASES[name] ?? name},
    {title: "time", number: true, text: ([, ms]) => duration(ms)},
    {title: "share", number: true, text: ([, ms]) => `${number((100 * ms) / whole, 1)} %`},
    {
      title: "",
      control: (cell, [, ms]) => {
        const share = el("div", {class: "share"});
        share.style.width = `${(100 * ms) / whole}%`;
        cell.replaceChildren(share);
      },
    },
  ];
  fill(table, columns, Object.entries(found.phases_ms), ([name]) => name);
  return table;
}

function limits(rows) {
  const table = el("table", {"aria-label": "limits as they stood"});
  const columns = [
    {title: "limit", text: (row) => row.limit},
    {title: "it took", number: true, text: (row) => (row.refused ? "refused" : number(row.reserved, 4))},
    {title: "left", number: true, text: (row) => number(row.left, 4)},
    {title: "of", number: true, text: (row) => number(row.most, 4)},
    {title: "unused again after", number: true, text: (row) => (row.renewed_s === null ? "" : duration(row.renewed_s * 1000))},
  ];
  fill(table, columns, rows, (row) => row.limit);
  return table;
}
