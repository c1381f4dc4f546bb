// Curves, drawn by plotly. Names come from runs' folders: plotly reads tags in texts, so that none is let through.
"use strict";
const COLORS = ["#3b7dd8", "#d98b2b", "#2a9d6f", "#7a5cc2", "#c9474f", "#2b9fb5", "#9a7b1f", "#b3569b", "#6b7a8f",
                "#5d8a2f", "#a4530c", "#4757c9"];

function tagless(text) { return String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;"); }

// A long name is shortened in its middle, since sweeps tell their runs apart at both ends.
function shortened(text) { return text.length <= 26 ? text : `${text.slice(0, 12)}…${text.slice(-13)}`; }

// One figure in `place`: `lines` are {name, x, y, color?, dash?}; `title` stands at the y axis.
function draw(place, lines, title, axis, options = {}) {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(name).trim();
  const names = lines.map((line) => shortened(String(line.name))), wide = place.clientWidth || 400;
  const beside = Math.max(1, Math.floor((wide - 72) / (60 + 7.5 * Math.max(...names.map((n) => n.length)))));
  const legend = lines.length > 1 ? 20 * Math.ceil(lines.length / beside) : 0;  // it takes nothing from the curves
  const traces = lines.map((line, i) => ({
    x: line.x, y: line.y, name: tagless(names[i]), type: "scatter",
    mode: line.x.length > 60 ? "lines" : "lines+markers", marker: { size: 5 },
    line: { color: line.color ?? COLORS[i % COLORS.length], width: 2.2, dash: line.dash ?? "solid" } }));
  const grid = { gridcolor: of("--line"), zerolinecolor: of("--line"), linecolor: of("--line"), automargin: true };
  const most = Math.max(1, ...lines.flatMap((line) => line.x.length ? [line.x[line.x.length - 1]] : []));
  place.wide = wide;
  place.again = () => { Plotly.purge(place); draw(place, lines, title, axis, options); };  // or old margins stay
  Plotly.react(place, traces, {
    height: 280 + legend, width: wide, margin: { l: 56, r: 16, t: 12, b: 44 }, paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)", font: { family: "system-ui, sans-serif", size: 13, color: of("--text") },
    hoverlabel: { bgcolor: of("--card"), font: { color: of("--text") } }, hovermode: "x unified",
    showlegend: lines.length > 1, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    xaxis: { ...grid, title: { text: axis }, ...(most <= 12 ? { dtick: 1 } : { nticks: wide < 420 ? 5 : 10 }) },
    yaxis: { ...grid, title: { text: tagless(title) }, rangemode: "tozero",
             ...(options.share ? { tickformat: ".0%", range: [0, 1.05] } : {}), ...(options.bytes ? { tickformat: "~s" } : {}) },
  }, { displaylogo: false, responsive: false, displayModeBar: false });
}

// A figure follows its card's width, and the browser's light or dark.
const widths = new ResizeObserver((cards) => {
  for (const card of cards) for (const plot of card.target.querySelectorAll(".js-plotly-plot")) {
    if (plot.clientWidth && plot.clientWidth !== plot.wide) plot.again();  // its legend takes other rows
  }
});
