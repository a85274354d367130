"use strict";
const $ = id => document.getElementById(id);
const articles = [...document.querySelectorAll("article")];
const marks = articles.map(one => new Set(one.dataset.marks.split(" ")));
const texts = [];       // of each article, once they are searched
const selects = ["benchmark", "category", "state"].map($);

function show() {
  const chosen = selects.map(one => one.value).filter(Boolean);
  const words = $("text").value.trim().toLowerCase();
  let shown = 0;
  articles.forEach((one, i) => {
    const fits = chosen.every(mark => marks[i].has(mark)) &&
      (!words || (texts[i] ??= one.textContent.toLowerCase()).includes(words));
    one.hidden = !fits;
    shown += fits;
  });
  $("count").textContent = `${shown} of ${articles.length} questions`;
  $("none").hidden = shown > 0 || !articles.length;
}

// Categories are those of the chosen benchmark.
$("benchmark").onchange = () => {
  for (const group of $("category").querySelectorAll("optgroup")) {
    const other = Boolean($("benchmark").value) && group.dataset.of !== $("benchmark").value;
    group.hidden = group.disabled = other;
    if (other && group.contains($("category").selectedOptions[0])) $("category").value = "";
  }
  show();
};
$("category").onchange = $("state").onchange = $("text").oninput = show;
$("filters").onsubmit = event => event.preventDefault();

document.onkeydown = event => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.matches("input, select")) return;
  const there = articles.filter(one => !one.hidden);
  // From the question that has the focus, or else the first that is seen.
  const focused = document.activeElement.closest("article");
  const at = focused ? there.indexOf(focused) : there.findIndex(one => one.getBoundingClientRect().bottom > 0);
  const next = {j: focused ? at + 1 : at, k: at - 1}[event.key];
  if (event.key === "/") $("text").focus();
  else if (next === undefined || !there[next]) return;
  else there[next].focus();
  event.preventDefault();
};

$("filters").hidden = false;
$("benchmark").onchange();
