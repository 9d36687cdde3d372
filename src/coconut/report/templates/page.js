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
// A click on a column's head sorts by it, a second one in the other order, a third one brings the table's own order back.
const value = cell => { const text = cell.textContent.trim(), found = parseFloat(text.replaceAll(",", "")); return [found, text]; };
const compare = (one, other) => {
  const [[a, s], [b, t]] = [value(one), value(other)];
  if (isNaN(a) !== isNaN(b)) return isNaN(a) ? 1 : -1;
  return isNaN(a) ? s.localeCompare(t) : a - b;
};
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], own = [...body.rows], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const next = { ascending: "descending", descending: null }[head.getAttribute("aria-sort") ?? ""];
      const order = next === undefined ? "ascending" : next;
      heads.forEach(one => one.removeAttribute("aria-sort"));
      if (order) head.setAttribute("aria-sort", order);
      const sign = order === "descending" ? -1 : 1;
      body.append(...(order ? [...own].sort((a, b) => sign * compare(a.cells[column], b.cells[column])) : own));
    });
  });
}
// Questions: those that hold every word of the search, and that the chosen entry got wrong.
for (const place of document.querySelectorAll(".questions")) {
  const { entries, rows } = JSON.parse(place.querySelector("script").textContent);
  const [input, select, output, list, more] = ["input", "select", "output", ".found", ":scope > button"].map(name => place.querySelector(name));
  const line = (name, text, kind) => {
    const [dt, dd] = ["dt", "dd"].map(tag => document.createElement(tag));
    dt.textContent = name;
    dd.textContent = text;
    if (kind) dd.className = kind;
    return [dt, dd];
  };
  const draw = row => {
    const card = document.createElement("article"), parts = document.createElement("dl");
    card.className = "card";
    parts.append(...line(`question ${row.index}`, row.question), ...(row.steps ? line("steps", row.steps) : []), ...line("right answer", row.gold));
    if (row.thoughts) parts.append(...line("thoughts", row.thoughts));
    row.answers.forEach((answer, place) => { if (answer) parts.append(...line(entries[place], `${answer[0]} ${answer[1] ? "✓" : "✗"}`, answer[1] ? "right" : "wrong")); });
    card.append(parts);
    return card;
  };
  let found = rows, shown = 0;
  const grow = count => {
    list.append(...found.slice(shown, shown + count).map(draw));
    shown = Math.min(found.length, shown + count);
    more.hidden = shown === found.length;
  };
  const search = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    found = rows.filter(row => (select.value === "" || row.answers[select.value]?.[1] === false)
      && words.every(word => `${row.index} ${row.question} ${row.gold} ${row.answers.map(one => one?.[0]).join(" ")}`.toLowerCase().includes(word)));
    list.replaceChildren();
    shown = 0;
    output.textContent = `${found.length} of ${rows.length}`;
    grow(5);
  };
  input.addEventListener("input", search);
  select.addEventListener("change", search);
  more.addEventListener("click", () => grow(50));
  search();
}
const open = isOpen => document.querySelectorAll("details").forEach(one => { one.open = isOpen; });
window.addEventListener("beforeprint", () => open(true));
