"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const METRICS = new Map(DATA.metrics);
const COLOURS = [
  ...["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"],
  ...["#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"],
];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const FEW = 60; // points of a curve up to which each gets a marker
const CONFIG = {
  responsive: true,
  scrollZoom: true,
  displaylogo: false,
  showSendToCloud: false, // plotly offers to share a chart on its server, unless told otherwise
  plotlyServerURL: "",
};

const plot = document.getElementById("plot");
const controls = Object.fromEntries(["metric", "x", "log", "smoothing"].map((id) => [id, document.getElementById(id)]));
const dark = window.matchMedia("(prefers-color-scheme: dark)");

// plotly parses names as a subset of HTML, and text between two $ as mathematics.
const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll("$", "&#36;");

// Exponential moving average, divided by the sum of its weights so that it does not begin near 0. Gaps stay gaps.
function smooth(values, weight) {
  let sum = 0, weights = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    weights = weight * weights + (1 - weight);
    return sum / weights;
  });
}

function places(curve, x) {
  if (x === "seconds") return curve.seconds;
  const batch = x === "steps" ? 1 : DATA.runs[curve.run].batch;
  return curve.steps.map((step) => (batch === null ? null : step * batch));
}

function traces() {
  const weight = Number(controls.smoothing.value);
  const raw = weight ? " (raw %{customdata:.6~g})" : "";
  return METRICS.get(controls.metric.value).flatMap((curve) => {
    const look = Math.floor(curve.run / COLOURS.length) % DASHES.length;
    const trace = {
      type: "scatter",
      mode: curve.steps.length <= FEW ? "lines+markers" : "lines",
      name: plain(DATA.runs[curve.run].name),
      uid: `${curve.run}`,
      legendgroup: `${curve.run}`,
      x: places(curve, controls.x.value),
      y: weight ? smooth(curve.means, weight) : curve.values,
      customdata: curve.values,
      line: { color: COLOURS[curve.run % COLOURS.length], dash: DASHES[look], width: 1.6 },
      hovertemplate: `<b>%{fullData.name}</b><br>%{xaxis.title.text} %{x}<br>%{yaxis.title.text} %{y:.6~g}${raw}<extra></extra>`,
    };
    const behind = { uid: `${curve.run} raw`, y: curve.values, opacity: 0.25, showlegend: false, hoverinfo: "skip" };
    return weight ? [{ ...trace, ...behind, hovertemplate: null }, trace] : [trace];
  });
}

function layout() {
  const style = getComputedStyle(document.body);
  const axis = { gridcolor: style.getPropertyValue("--line"), zeroline: false };
  const { metric, x, log } = controls;
  const unit = x.value === "seconds" ? " [s]" : "";
  return {
    // Hidden runs stay hidden; a zoom stays as long as the axis is the same.
    uirevision: "runs",
    xaxis: { ...axis, title: { text: x.selectedOptions[0].text + unit }, uirevision: `${metric.value} ${x.value}` },
    yaxis: {
      ...axis,
      title: { text: plain(metric.value) },
      type: log.checked ? "log" : "linear",
      exponentformat: "e",
      uirevision: `${metric.value} ${log.checked}`,
    },
    margin: { l: 70, r: 10, t: 30, b: 45 },
    paper_bgcolor: "transparent",
    plot_bgcolor: "transparent",
    font: { color: style.color },
    hovermode: "closest",
    hoverlabel: { align: "left" },
    modebar: { bgcolor: "transparent", color: style.getPropertyValue("--faint"), activecolor: style.color },
    showlegend: true,
  };
}

function draw() {
  document.getElementById("weight").value = controls.smoothing.value;
  return Plotly.react(plot, traces(), layout(), CONFIG);
}

for (const key of METRICS.keys()) controls.metric.add(new Option(key, key));
for (const control of Object.values(controls)) control.addEventListener("input", draw);
dark.addEventListener("change", draw);
draw();
