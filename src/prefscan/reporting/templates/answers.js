// Two models' answers side by side. Whatever a model, a question or the judge said becomes textContent, never markup.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const control = Object.fromEntries(
  ["left", "right", "category", "order"].map((name) => [name, document.getElementById(name)]));

function add(parent, tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  parent.append(element);
  return element;
}

function fill(select, values) {
  for (const value of values) add(select, "option", value).value = value;
}

// The mean over all judgements of a model's answer to a question; null where it has none.
function mean(model, number) {
  const scores = (data.models[model][number]?.judgements ?? []).map((judgement) => judgement.score);
  return scores.length ? scores.reduce((sum, score) => sum + score, 0) / scores.length : null;
}

function difference(question) {
  const [left, right] = [control.left, control.right].map((side) => mean(side.value, question.number));
  return left === null || right === null ? null : left - right;
}

const ORDERS = {
  number: () => 0,
  left: (a, b) => (difference(b) ?? -Infinity) - (difference(a) ?? -Infinity),
  right: (a, b) => (difference(a) ?? Infinity) - (difference(b) ?? Infinity),
  size: (a, b) => Math.abs(difference(b) ?? 0) - Math.abs(difference(a) ?? 0),
};

function side(parent, model, number, turn) {
  const column = add(parent, "div");
  add(column, "h4", model);
  const found = data.models[model][number];
  if (!found) {
    add(column, "p", "not answered");
    return;
  }
  add(column, "p", found.turns[turn] || "(empty)", "text answer");
  for (const judgement of found.judgements.filter((judgement) => judgement.turn === turn + 1)) {
    const words = add(column, "details");
    add(words, "summary", `Judge: ${judgement.score.toFixed(2)}`);
    add(words, "p", judgement.words, "text");
  }
}

function show() {
  const category = control.category.value;
  const questions = data.questions.filter((question) => category === "all" || question.category === category);
  questions.sort(ORDERS[control.order.value]);
  const main = document.getElementById("answers");
  main.replaceChildren();
  for (const question of questions) {
    const article = add(main, "article");
    const apart = difference(question);
    const verdict = apart === null ? "no difference known" : `difference ${apart >= 0 ? "+" : "−"}${Math.abs(apart).toFixed(2)}`;
    add(article, "h2", `Question ${question.number}, ${question.category}: ${verdict}`);
    question.turns.forEach((asked, turn) => {
      add(article, "p", asked, "asked");
      const pair = add(article, "div", undefined, "pair");
      for (const name of ["left", "right"]) side(pair, control[name].value, question.number, turn);
    });
  }
  document.getElementById("count").textContent = `${questions.length} of ${data.questions.length} questions`;
}

const models = Object.keys(data.models);
fill(control.left, models);
fill(control.right, models);
control.left.value = models[Math.min(1, models.length - 1)];
fill(control.category, ["all", ...new Set(data.questions.map((question) => question.category))]);
for (const select of Object.values(control)) select.addEventListener("change", show);
show();
