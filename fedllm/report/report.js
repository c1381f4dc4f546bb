// Plotly cannot read CSS variables, so text and grid are repainted whenever the browser goes light or dark.
const dark = matchMedia("(prefers-color-scheme: dark)");
function paint() {
  const style = getComputedStyle(document.documentElement);
  const text = style.getPropertyValue("--text").trim(), line = style.getPropertyValue("--line").trim();
  const card = style.getPropertyValue("--card").trim();
  for (const plot of document.querySelectorAll(".js-plotly-plot")) {
    const change = { "font.color": text, "hoverlabel.bgcolor": card, "hoverlabel.font.color": text };
    for (const axis of ["xaxis", "yaxis"]) {
      change[axis + ".gridcolor"] = line;
      change[axis + ".zerolinecolor"] = line;
      change[axis + ".linecolor"] = line;
    }
    plot.data.forEach((trace, i) => trace.type === "heatmap" && Plotly.restyle(plot, { "textfont.color": text }, [i]));
    Plotly.relayout(plot, change).then(() => Plotly.Plots.resize(plot));
  }
}
dark.addEventListener("change", paint);
addEventListener("load", () => requestAnimationFrame(paint));  // once the grid has settled
// A chart is drawn as wide as its card was when there were no other cards; it follows its card from then on.
const sizes = new ResizeObserver((cards) => {
  for (const card of cards)
    for (const plot of card.target.querySelectorAll(".js-plotly-plot")) Plotly.Plots.resize(plot);
});
for (const card of document.querySelectorAll(".card")) sizes.observe(card);
