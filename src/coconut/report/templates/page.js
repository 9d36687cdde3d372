"use strict";
// Names the points below the pointer, or at the place that the arrow keys choose, and switches lines off and on.
const charts = document.querySelectorAll(".chart");
const number = value => Number(value.toPrecision(4)).toString();
for (const chart of charts) {
  const output = chart.parentElement.querySelector("output");
  const [xLow, xHigh, xStart, xEnd] = chart.dataset.x.split(" ").map(Number);
  const [yLow, yHigh, yStart, yEnd] = chart.dataset.y.split(" ").slice(0, 4).map(Number);
  const isLog = chart.dataset.y.endsWith("log");
  const share = (at, start, end) => (at - start) / (end - start);
  const toX = at => xLow + share(at, xStart, xEnd) * (xHigh - xLow);
  const toY = at => isLog ? yLow * (yHigh / yLow) ** share(at, yStart, yEnd) : yLow + share(at, yStart, yEnd) * (yHigh - yLow);
  const series = [...chart.querySelectorAll(".series")].map(group => ({
    group, label: group.dataset.label,
    points: group.querySelector("polyline").getAttribute("points").split(" ").map(pair => pair.split(",").map(Number)),
  }));
  const cross = document.createElementNS("http://www.w3.org/2000/svg", "path");
  cross.setAttribute("class", "cross");
  chart.append(cross);
  let place = null;
  const show = at => {
    place = Math.min(Math.max(at, Math.min(xStart, xEnd)), Math.max(xStart, xEnd));
    cross.setAttribute("d", `M${place} ${yStart}V${yEnd}`);
    const lines = [];
    for (const { group, label, points } of series) {
      if (group.classList.contains("off")) continue;
      const near = points.reduce((best, point) => Math.abs(point[0] - place) < Math.abs(best[0] - place) ? point : best);
      // A line that is not there at this place, as that of an earlier stage, is not named.
      if (place >= points[0][0] - 8 && place <= points.at(-1)[0] + 8) lines.push(`${label}: ${number(toY(near[1]))}`);
    }
    output.textContent = `at ${number(toX(place))}: ${lines.join(", ") || "nothing"}`;
  };
  const hide = () => { cross.removeAttribute("d"); output.textContent = ""; };
  chart.addEventListener("pointermove", event => {
    const box = chart.getBoundingClientRect();
    show((event.clientX - box.left) * chart.viewBox.baseVal.width / box.width);
  });
  chart.addEventListener("pointerleave", hide);
  chart.addEventListener("blur", hide);
  chart.addEventListener("keydown", event => {
    const step = { ArrowRight: 4, ArrowLeft: -4 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    show((place ?? (step > 0 ? xStart - step : xEnd - step)) + step);
  });
}
for (const button of document.querySelectorAll(".legend button")) {
  button.addEventListener("click", () => {
    const isOn = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(isOn));
    for (const group of button.closest("section").querySelectorAll(".series")) {
      if (group.dataset.label === button.dataset.label) group.classList.toggle("off", !isOn);
    }
  });
}
const open = isOpen => document.querySelectorAll("details").forEach(one => { one.open = isOpen; });
window.addEventListener("beforeprint", () => open(true));
