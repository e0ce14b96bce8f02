// Puts the interactive chart where its picture stands, in the reader's colours, and lets one choice of a loss reach all.
"use strict";
const specs = JSON.parse(document.getElementById("specs").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const shown = document.getElementById("shown");
let views = [];

function colours() {
  const ink = dark.matches ? "#e6e6e6" : "#222222", line = dark.matches ? "#3a3a3a" : "#dddddd";
  const text = { labelColor: ink, titleColor: ink };
  return {
    background: "transparent",
    title: { color: ink, subtitleColor: ink },
    style: { "guide-label": { fill: ink }, "guide-title": { fill: ink } },
    axis: { ...text, gridColor: line, domainColor: line, tickColor: line },
    header: text,
    legend: { ...text, symbolOpacity: 1 },
    view: { stroke: line },
  };
}

async function draw() {
  views.forEach((view) => view.finalize());
  views = await Promise.all(Object.entries(specs).map(async ([name, spec]) => {
    const place = document.querySelector(`#${name} .chart`);
    place.replaceChildren();
    place.classList.remove("static");
    // `ast` evaluates expressions without making functions of text, which the page's policy forbids.
    const result = await vegaEmbed(place, spec, {
      ast: true,
      renderer: "svg",
      config: colours(),
      actions: { export: true, source: false, compiled: false, editor: false },
      downloadFileName: name,
    });
    return result.view;
  }));
  show();
  document.documentElement.dataset.drawn = views.length;
}

function show() {
  for (const view of views) {
    if (view.getState({ data: () => false, signals: (name) => name === "shown" }).signals.shown !== undefined) {
      view.signal("shown", shown.value).run();
    }
  }
}

shown.addEventListener("change", show);
dark.addEventListener("change", draw);
document.querySelector(".shown").hidden = false;
draw();
