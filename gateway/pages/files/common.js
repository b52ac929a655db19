// What both pages are made of. Text from elsewhere gets onto a page as text alone: there is no way from here to markup.

/** An element with attributes (`on...` is a listener, null none) and children, of which strings are text. */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** The element of this id. */
export const by = (id) => document.getElementById(id);

/** Change an element's text only where it differs: a screen reader says again what is set again. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

const known = new WeakMap();

/**
 * Bring a table to these items. `columns`: of each its title, its text, and where it is more than text `control(cell, item)`, which fills
 * the cell the first time and brings it up to date afterwards. An item that stays keeps its row, and with it focus and selection.
 */
export function fill(table, columns, items, keyOf) {
  if (!known.has(table)) {
    known.set(table, new Map());
    const titles = columns.map((column) => el("th", {role: "columnheader", scope: "col", class: column.number ? "number" : null}, column.title));
    table.setAttribute("role", "table");
    table.append(
      el("thead", {role: "rowgroup"}, el("tr", {role: "row"}, ...titles)),
      el("tbody", {role: "rowgroup"}),
    );
  }
  const rows = known.get(table);
  const body = table.tBodies[0];
  const wanted = new Set(items.map(keyOf));
  for (const [key, row] of rows) {
    if (!wanted.has(key)) {
      row.remove();
      rows.delete(key);
    }
  }
  items.forEach((item, place) => {
    const key = keyOf(item);
    let row = rows.get(key);
    if (!row) {
      row = el("tr", {role: "row"}, ...columns.map((column) =>
        el("td", {role: "cell", "data-label": column.title, class: column.number ? "number" : null})));
      rows.set(key, row);
    }
    if (body.children[place] !== row) body.insertBefore(row, body.children[place] ?? null);
    columns.forEach((column, at) => {
      const cell = row.cells[at];
      if (column.control) column.control(cell, item);
      else say(cell, column.text(item));
    });
  });
}

/** The server-sent events of an answer, each with its name and its data. */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let kept = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    kept += value;
    for (let end; (end = kept.indexOf("\n\n")) >= 0; kept = kept.slice(end + 2)) {
      let event = "message";
      const data = [];
      for (const line of kept.slice(0, end).split("\n")) {
        if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
        else if (line.startsWith("event:")) event = line.slice(6).trim();
      }
      if (data.length) yield {event, data: data.join("\n")};
    }
  }
}

/** What an answer that is no success says, in words. */
export async function problem(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `${answer.status} ${answer.statusText}`;
  }
}

export const number = (value, digits = 0) =>
  value === null || value === undefined ? "" : value.toLocaleString("en", {maximumFractionDigits: digits});

/** Milliseconds as people read them. */
export function duration(ms) {
  if (ms === null || ms === undefined) return "";
  return ms < 1000 ? `${number(ms, ms < 10 ? 1 : 0)} ms` : `${number(ms / 1000, ms < 60000 ? 2 : 0)} s`;
}
