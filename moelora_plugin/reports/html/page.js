"use strict";
// Only textContent and attributes are set from data: prompts may hold markup.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// Documents.

const PAGE = 25;
let limit = PAGE;

function verdict(right) {
  const [name, sign] = right === null ? ["none", "·"] : right ? ["right", "✓"] : ["wrong", "✗"];
  return make("span", { class: name, "aria-label": name === "none" ? "rating" : name }, sign);
}

// Where the prompts of a task begin to differ: the start of that line.
function ownPart(prompts) {
  const [first = "", ...others] = prompts;
  let length = others.length ? first.length : 0;
  for (const prompt of others) {
    while (!prompt.startsWith(first.slice(0, length))) length -= 1;
  }
  return first.lastIndexOf("\n", length - 1) + 1;
}

function matches(row, show, words) {
  const [what, index] = show.split(" ");
  const model = data.models[Number(index)];
  const right = row.right[model];
  const before = row.right[data.reference];
  const chosen = {
    "": true,
    disagree: new Set(Object.values(row.right)).size > 1,
    wrong: right === false,
    right: right === true,
    fixed: right === true && before === false,
    broken: right === false && before === true,
  }[what];
  if (!chosen) return false;
  const text = [row.prompt, row.answer, ...Object.values(row.answers)].join("\n").toLowerCase();
  return words.every((word) => text.includes(word));
}

function answerTable(row) {
  const body = make("tbody");
  body.append(make("tr", {}, make("th", { scope: "row" }, "right answer"), make("td", {}, row.answer)));
  for (const [model, answer] of Object.entries(row.answers)) {
    const cell = make("td", {}, verdict(row.right[model]), ` ${answer}`);
    body.append(make("tr", { class: "first" }, make("th", { scope: "row" }, model), cell));
  }
  return make("table", {}, body);
}

function documentElement(row, start) {
  const marks = make("span", { class: "marks" });
  for (const model of Object.keys(row.right)) {
    marks.append(make("span", { title: model }, verdict(row.right[model])));
  }
  const summary = make(
    "summary",
    {},
    make("span", { class: "number" }, String(row.doc)),
    make("span", { class: "snippet" }, row.prompt.slice(start).replace(/\s+/g, " ")),
  );
  if (row.category) summary.append(make("span", { class: "tag" }, row.category));
  summary.append(marks);
  const details = make("details", { class: "document" }, summary);
  details.addEventListener("toggle", () => {
    if (!details.open || details.children.length > 1) return;
    const side = make("div");
    if (row.image) side.append(make("img", { src: row.image, alt: "the image of this question" }));
    side.append(answerTable(row));
    details.append(make("div", { class: "body" }, make("pre", { tabindex: "0" }, row.prompt), side));
  });
  return details;
}

function showDocuments() {
  const table = data.tasks.find((one) => one.name === byId("task").value);
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = table.documents.filter((row) => matches(row, byId("show").value, words));
  const start = ownPart(table.documents.map((row) => row.prompt));
  byId("list").replaceChildren(...found.slice(0, limit).map((row) => documentElement(row, start)));
  byId("count").textContent =
    `${found.length} of the ${table.documents.length} documents here, ${table.total} in all` +
    (data.models.length > 1 ? `; marks in the order ${data.models.join(", ")}` : "");
  byId("more").hidden = found.length <= limit;
}

if (data.tasks.length) {
  for (const [id, event] of [["task", "change"], ["show", "change"], ["search", "input"]]) {
    byId(id).addEventListener(event, () => {
      limit = PAGE;
      showDocuments();
    });
  }
  byId("search").form.addEventListener("submit", (event) => event.preventDefault());
  byId("more").addEventListener("click", () => {
    limit += PAGE;
    showDocuments();
  });
  showDocuments();
}

// Use of experts.

const CELL = 13;

function draw(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function colour(share) {
  const end = share < 1 ? "--cold" : "--hot";
  const weight = Math.min(Math.abs(share - 1), 1) * 100;
  return `color-mix(in oklab, var(${end}) ${weight.toFixed(1)}%, var(--fair))`;
}

function heatMap(kind, rows) {
  const experts = Math.max(...rows.map((row) => row.cells.length));
  const left = 8 + 6 * Math.max(...rows.map((row) => row.layer.length));
  const [width, height] = [left + experts * CELL + 2, (rows.length + 1) * CELL + 4];
  const size = { width, height, viewBox: `0 0 ${width} ${height}`, role: "img" };
  const svg = draw("svg", { ...size, "aria-label": `${kind}: layers by experts` });
  rows.forEach((row, i) => {
    const y = i * CELL;
    if (i % 5 === 0) {
      svg.append(draw("text", { x: left - 5, y: y + 10, "text-anchor": "end" }, row.layer));
    }
    row.cells.forEach((share, expert) => {
      const place = { x: left + expert * CELL, y, width: CELL - 1, height: CELL - 1 };
      const said = `layer ${row.layer}, expert ${expert}: ${share.toFixed(2)} × the fair share`;
      svg.append(draw("rect", { ...place, style: `fill: ${colour(share)}` }, draw("title", {}, said)));
    });
  });
  for (let expert = 0; expert < experts; expert += experts > 10 ? 5 : 1) {
    const x = left + (expert + 0.5) * CELL;
    svg.append(draw("text", { x, y: rows.length * CELL + 11, "text-anchor": "middle" }, String(expert)));
  }
  return make("figure", {}, make("figcaption", {}, kind), svg);
}

function showUse() {
  const [model, task] = [byId("use-model").value, byId("use-task").value];
  const used = data.expertUse.find((one) => one.model === model && one.task === task);
  const maps = used ? Object.entries(used.kinds).map(([kind, rows]) => heatMap(kind, rows)) : [];
  byId("heat").replaceChildren(...maps);
}

if (data.expertUse.length) {
  for (const [id, key] of [["use-model", "model"], ["use-task", "task"]]) {
    const names = new Set(data.expertUse.map((one) => one[key]));
    byId(id).append(...[...names].map((name) => make("option", {}, name)));
    byId(id).addEventListener("change", showUse);
  }
  showUse();
}
