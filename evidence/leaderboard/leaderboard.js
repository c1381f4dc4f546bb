"use strict";
const told = JSON.parse(document.getElementById("rows").textContent);
const COLORS = ["#3b7dd8", "#d98b2b", "#2a9d6f", "#b5485d", "#7a5cc2", "#4aa3b5", "#8a8f3c", "#c06fb0", "#6b7a8f", "#a0522d",
  "#1d2733", "#e0674c", "#5b8c5a", "#99621e", "#2f4b9a", "#c9a227", "#7f7f7f", "#00796b"];
const families = [...new Set(told.rows.map((r) => r.family))].sort();
const color = (r) => COLORS[families.indexOf(r.family) % COLORS.length];
const $ = (id) => document.getElementById(id);
const ran = (r) => r.status === "measured" || r.status === "part";

const unit = (value, steps) => {
  let i = 0;
  while (value >= 1000 && i < steps.length - 1) { value /= 1000; i += 1; }
  return `${i ? value.toFixed(1) : Math.round(value)} ${steps[i]}`;
};
const bytes = (v) => (v == null ? "-" : unit(v, ["B", "kB", "MB", "GB", "TB"]));
const seconds = (v) => (v == null ? "-" : `${v.toFixed(1)} s`);
const joules = (v) => (v == null ? "-" : unit(v, ["J", "kJ", "MJ"]));
const both = (r) => (r.up == null ? null : r.up + r.down);
const amount = (r, cost) => (cost === "bytes" ? both(r) : r[cost]);
const said = { bytes, cpu_seconds: seconds, joules, memory: bytes };

function quality(q, world) {
  if (!q || q[0] == null) return "-";
  const share = told.worlds[world].metric === "accuracy";
  const [mean, low, high] = q;
  const text = share ? `${(100 * mean).toFixed(1)} %` : mean.toFixed(3);
  if (low == null) return text;
  const half = (high - low) / 2;
  return `${text} ± ${share ? (100 * half).toFixed(1) : half.toPrecision(2)}`;
}
function more(r, which) {
  const q = r.against[which];
  if (!q || q[0] == null) return "-";
  const [by, digits] = told.worlds[r.world].metric === "accuracy" ? [100, 1] : [1, 3];
  const half = q[1] == null ? "" : ` ± ${((by * (q[2] - q[1])) / 2).toFixed(digits)}`;
  return `${q[0] >= 0 ? "+" : ""}${(by * q[0]).toFixed(digits)}${half}`;
}
const COLUMNS = [
  ["method", (r) => r.method + (r.stale ? "*" : ""), (r) => r.method],
  ["family", (r) => r.family, (r) => r.family, "word"],
  ["global", (r) => quality(r.global, r.world), (r) => (r.global ? r.global[0] : null)],
  ["global - fedit", (r) => more(r, "global"), (r) => (r.against.global ? r.against.global[0] : null)],
  ["personal", (r) => quality(r.personal, r.world), (r) => (r.personal ? r.personal[0] : null)],
  ["personal - fedit", (r) => more(r, "personal"), (r) => (r.against.personal ? r.against.personal[0] : null)],
  ["up", (r) => bytes(r.up), (r) => r.up],
  ["down", (r) => bytes(r.down), (r) => r.down],
  ["CPU", (r) => seconds(r.cpu_seconds), (r) => r.cpu_seconds],
  ["memory", (r) => bytes(r.memory), (r) => r.memory],
  ["energy (est.)", (r) => joules(r.joules), (r) => r.joules],
  ["seeds", (r) => r.seeds || "-", (r) => r.seeds],
  ["space", (r) => r.space || "-", (r) => r.space, "word"],
  ["rates", (r) => r.rates || "-", (r) => r.rates, "word"],
  ["the server sees, or why there is no figure", (r) => r.why || (r.pooled ? "all rows: " : "") + r.sends
    + (r.kinds && r.kinds.length ? ` (${r.kinds.join(", ")} leaves the client)` : ""), (r) => r.why || r.sends, "text"],
];
const state = { sort: 2, up: false };

function fill(select, pairs) {
  for (const [value, text] of pairs) select.add(new Option(text, value));
}
function chosen() {
  const text = $("text").value.toLowerCase().trim(), show = $("show").value;
  return told.rows.filter((r) => r.world === $("world").value
    && (!$("family").value || r.family === $("family").value)
    && (show === "all" || (show === "done" && ran(r)) || (show === "not" && !ran(r)) || r.front.includes(show))
    && (!text || [r.method, r.title, r.family, r.sends, r.why, r.space].join(" ").toLowerCase().includes(text)));
}
function sorted(rows) {
  const value = COLUMNS[state.sort][2], sign = state.up ? 1 : -1;
  return [...rows].sort((a, b) => {
    const x = value(a), y = value(b);
    if (x == null || y == null || x === "" || y === "") return (x == null || x === "") - (y == null || y === "");
    return sign * (typeof x === "string" ? x.localeCompare(y) : x - y) || a.method.localeCompare(b.method);
  });
}
function heads() {
  $("head").replaceChildren(...COLUMNS.map(([name], i) => {
    const th = document.createElement("th"), button = document.createElement("button");
    th.className = COLUMNS[i][3] || "";
    const mark = i === state.sort ? (state.up ? " ▲" : " ▼") : "";
    button.textContent = name + mark;
    button.type = "button";
    th.setAttribute("aria-sort", i !== state.sort ? "none" : state.up ? "ascending" : "descending");
    button.onclick = () => {
      state.up = state.sort === i ? !state.up : i < 2;
      state.sort = i;
      draw();
    };
    th.append(button);
    return th;
  }));
}
function table(rows) {
  $("body").replaceChildren(...rows.map((r) => {
    const tr = document.createElement("tr");
    tr.dataset.method = r.method;
    tr.title = r.title;
    for (const [, text, , kind] of COLUMNS) {
      const td = document.createElement("td");
      td.textContent = text(r);
      if (kind) td.className = kind;
      tr.append(td);
    }
    return tr;
  }));
}
function tag(name, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [k, v] of Object.entries(attributes)) node.setAttribute(k, v);
  if (text != null) node.textContent = text;
  return node;
}
function label(svg, text, x, y, box, taken) {
  const w = 6.2 * text.length;  // beside the point, on the first side that is free
  for (const [left, low] of [[x + 8, y + 4], [x - 8 - w, y + 4], [x - w / 2, y - 9], [x - w / 2, y + 18]]) {
    const [a, b, c, d] = [left, low - 10, left + w, low + 2];
    if (a < box.left || c > box.right || b < 0 || d > box.low) continue;
    if (taken.some(([e, f, g, h]) => e < c && a < g && f < d && b < h)) continue;
    taken.push([a, b, c, d]);
    svg.append(tag("text", { x: left, y: low }, text));
    return;
  }
}
function chart(rows) {
  const which = $("y").value, cost = $("x").value, world = told.worlds[$("world").value];
  const points = rows.filter((r) => r[which] && amount(r, cost) != null);
  const wide = Math.max(300, $("chart").clientWidth), high = wide < 600 ? 300 : 380;
  const box = { left: 54, right: wide - 12, top: 12, low: high - 40 };
  const svg = tag("svg", { viewBox: `0 0 ${wide} ${high}`, "font-size": 11, fill: "#1d2733", role: "img",
    "aria-label": `${world.metric} of the ${which} model against ${cost}` });
  $("chart").replaceChildren(svg);
  if (!points.length) {
    svg.append(tag("text", { x: wide / 2, y: high / 2, "text-anchor": "middle" }, "nothing measured is chosen"));
    return;
  }
  const least = Math.min(...points.map((r) => amount(r, cost)).filter((v) => v > 0), Infinity) / 3;
  const floor = Number.isFinite(least) ? least : 1;
  const xs = points.map((r) => Math.log10(Math.max(amount(r, cost), floor)));
  const ys = points.map((r) => r[which][0]);
  const span = (v) => {
    const room = (Math.max(...v) - Math.min(...v)) || Math.abs(v[0]) * 0.1 || 1;
    return [Math.min(...v) - 0.06 * room, Math.max(...v) + 0.08 * room];
  };
  const [x0, x1] = span(xs), [y0, y1] = span(ys);
  const px = (x) => box.left + ((x - x0) / (x1 - x0)) * (box.right - box.left);
  const py = (y) => box.low - ((y - y0) / (y1 - y0)) * (box.low - box.top);
  for (let i = 0; i <= 4; i += 1) {
    const y = y0 + ((y1 - y0) * i) / 4;
    svg.append(tag("line", { x1: box.left, x2: box.right, y1: py(y), y2: py(y), stroke: "#e6e9ee" }),
      tag("text", { x: box.left - 6, y: py(y) + 4, "text-anchor": "end" },
        world.metric === "accuracy" ? `${Math.round(100 * y)} %` : y.toFixed(2)));
  }
  let drawn = -Infinity;  // ticks that would run into the one before stand without a number
  const tick = (x, text) => {
    const room = px(x) - drawn > 58;
    if (room) drawn = px(x);
    svg.append(tag("line", { x1: px(x), x2: px(x), y1: box.top, y2: box.low, stroke: "#e6e9ee" }),
      tag("text", { x: px(x), y: box.low + 16, "text-anchor": "middle" }, room ? text : ""));
  };
  const powers = [];
  for (let p = Math.ceil(x0); p <= Math.floor(x1); p += 1) powers.push(p);
  const marks = powers.length > 1 ? powers : [x0 + 0.1 * (x1 - x0), (x0 + x1) / 2, x1 - 0.1 * (x1 - x0)];
  if (points.some((r) => amount(r, cost) === 0)) tick(Math.log10(floor), "none");
  for (const p of marks) if (10 ** p > 2 * floor || !points.some((r) => amount(r, cost) === 0)) tick(p, said[cost](10 ** p));
  svg.append(tag("text", { x: (box.left + box.right) / 2, y: high - 6, "text-anchor": "middle", fill: "#6b7a8f" },
    "filled: no other is as good for fewer bytes"));
  const taken = points.map((r, i) => [px(xs[i]) - 5, py(ys[i]) - 5, px(xs[i]) + 5, py(ys[i]) + 5]);
  points.forEach((r, i) => {
    const dot = tag("circle", { cx: px(xs[i]), cy: py(ys[i]), r: 5, stroke: color(r), "stroke-width": 2,
      fill: r.front.includes(which) ? color(r) : "#fff", tabindex: 0 });
    const text = `${r.method} (${r.family}): ${quality(r[which], r.world)}, ${said[cost](amount(r, cost))}`;
    dot.append(tag("title", {}, text));
    const on = (yes) => {
      $("hover").textContent = yes ? text : "";
      for (const tr of $("body").rows) tr.classList.toggle("on", yes && tr.dataset.method === r.method);
    };
    dot.addEventListener("pointerenter", () => on(true));
    dot.addEventListener("pointerleave", () => on(false));
    dot.addEventListener("focus", () => on(true));
    dot.addEventListener("blur", () => on(false));
    svg.append(dot);
    if (r.front.includes(which)) label(svg, r.method, px(xs[i]), py(ys[i]), box, taken);
  });
}
function draw() {
  const rows = chosen(), world = told.worlds[$("world").value];
  $("about").textContent = `${world.about} ${world.work}; by ${world.metric}, ${world.better === "min" ? "less" : "more"} `
    + "is better.";
  $("count").textContent = `${rows.length} of ${told.rows.filter((r) => r.world === $("world").value).length} methods`;
  heads();
  table(sorted(rows));
  chart(rows);
}
function order() {
  state.sort = 2;
  state.up = told.worlds[$("world").value].better === "min";
  draw();
}
fill($("world"), Object.entries(told.worlds).map(([name, w]) => [name, w.title]));
fill($("family"), [["", "all"], ...families.map((f) => [f, f])]);
$("filters").addEventListener("submit", (event) => event.preventDefault());
$("world").addEventListener("change", order);
for (const id of ["family", "show", "x", "y"]) $(id).addEventListener("change", draw);
$("text").addEventListener("input", draw);
window.addEventListener("resize", () => chart(chosen()));
if (Object.keys(told.worlds).length) order();
else $("about").textContent = "Nothing has been measured yet.";
