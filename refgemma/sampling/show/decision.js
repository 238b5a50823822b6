"use strict";
// One decision, and tokens coloured by their probability: shared by every page that shows them.
const find = id => document.getElementById(id);
// Everything that came from a model goes in as text, never as markup.
const make = (tag, text = "", name = "") => {
  const node = document.createElement(tag);
  node.textContent = text;
  if (name) node.className = name;
  return node;
};
const percent = p => {
  const hundred = 100 * p;
  if (p === 0) return "0 %";
  if (hundred < 0.001) return hundred.toExponential(0) + " %";
  return (hundred >= 99.995 ? "100" : hundred >= 10 ? hundred.toFixed(1) : hundred >= 0.1 ? hundred.toFixed(2) : hundred.toFixed(3)) + " %";
};
const nats = x => x === null ? "\u221e" : x.toFixed(3);
const number = x => x === null ? "\u2212\u221e" : String(Number(x.toPrecision(4))).replace("-", "\u2212");

// The classes of surprise, as the server or the record names them.
function showLegend(labels) {
  find("legend").append(make("li", "the model gave the token"));
  labels.forEach((label, i) => {
    const item = make("li", label);
    item.prepend(make("i", "", "s" + i));
    find("legend").append(item);
  });
  find("legend").append(make("li", "near tie: rounding could have changed it", "tie"));
}

// Half a character, a joiner, a separator: nothing that a click could hit.
const invisible = /^(?!\t)[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]*$/u;
// Embeddings, overrides, isolates: a box of its own ends what they open, where unicode-bidi could be closed from within.
// Other tokens stay as they are: isolated, the tokens of a Hebrew or Arabic word would stand in the wrong order.
const override = /[\u202a-\u202e\u2066-\u2069]/;
function tokenSpan(token, t) {
  const span = make("span", token.text, "token s" + token.surprise);
  if (token.near_tie) span.classList.add("tie");
  if (/^[\r\n]/.test(token.text)) span.classList.add("newline");
  else if (invisible.test(token.text)) span.classList.add("blank");
  if (override.test(token.text)) span.classList.add("override");
  span.setAttribute("role", "option");
  span.setAttribute("aria-selected", "false");
  span.setAttribute("aria-label", "token " + t + ", " + token.label + ", " + percent(token.prob));
  span.title = token.label + " \u00b7 " + percent(token.prob);
  span.tabIndex = -1;
  return span;
}

// `token` is what token_data makes; the elements are those of the page, by id.
function showDecision(token, greedy) {
  find("name").textContent = token.label;
  const facts = [
    ["the model gave it", percent(token.prob)],
    ["rank", String(token.rank + 1)],
    ["surprise", nats(token.nats) + " nats"],
    ["drawn with", token.final === null ? "removed" : percent(token.final)],
    ["left to draw from", token.kept + (token.kept === 1 ? " token" : " tokens")],
    ["entropy, from to", nats(token.entropy[0]) + " \u2192 " + nats(token.entropy[1]) + " nats"],
    ["flips at a change of", token.flip === null ? "\u2013" : number(token.flip)],
  ];
  find("facts").replaceChildren(...facts.map(([name, value]) => {
    const item = make("div");
    item.append(make("dt", name), make("dd", value));
    return item;
  }));
  find("why").textContent = token.why;
  draw(token, greedy);
  table(token);
}

function draw(token, greedy) {
  const box = document.querySelector(".draw");
  box.hidden = token.interval === null || greedy;
  if (box.hidden) return;
  const [low, high] = token.interval;
  find("drawn").textContent = "The draw: u = " + token.u.toFixed(6) + ", the token owns " + low.toFixed(6) + " to " + high.toFixed(6) + " of the line";
  const segment = box.querySelector("b").style, mark = box.querySelector(".track i").style;
  segment.left = 100 * low + "%";
  segment.width = 100 * (high - low) + "%";
  mark.left = 100 * token.u + "%";
}

function table(token) {
  const head = make("tr");
  const name = make("th", "candidate"), id = make("th", "id");
  name.scope = id.scope = "col";
  head.append(name, id);
  for (const column of token.columns) {
    const cell = make("th", column.title);
    cell.scope = "col";
    cell.append(make("small", column.note || "\u00a0"));
    head.append(cell);
  }
  document.querySelector("thead").replaceChildren(head);
  document.querySelector("tbody").replaceChildren(...token.rows.map(row => {
    const line = make("tr", "", row.chosen ? "chosen" : "");
    const label = make("th", (row.mark || " ") + " " + row.label);
    label.scope = "row";
    label.title = row.label + (row.chosen ? " (the token)" : row.mark ? " (what these settings draw)" : "");
    line.append(label, make("td", row.id, "id"));
    let gone = false;
    row.probs.forEach((p, i) => {
      if (p === null) {
        line.append(gone ? make("td") : make("td", i ? "\u2715 removed" : "\u2212\u221e", "out"));
        gone = true;
        return;
      }
      const cell = make("td"), inner = make("span"), bar = make("i");
      bar.style.width = 100 * p + "%";
      inner.append(bar, make("b", percent(p)));
      inner.title = "logit " + number(row.logits[i]);
      cell.append(inner);
      line.append(cell);
    });
    return line;
  }));
}
