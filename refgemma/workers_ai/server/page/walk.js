"use strict";
// Moving through the tokens of an answer: which decision is shown.

let shown = null;  // {turn, t}

function select(turn, t, focus) {
  t = Math.min(Math.max(t, 0), turn.tokens.length - 1);
  if (shown) shown.turn.spans[shown.t].setAttribute("aria-selected", "false");
  for (const span of turn.spans) if (span.tabIndex === 0) span.tabIndex = -1;
  shown = {turn, t};
  const span = turn.spans[t];
  span.setAttribute("aria-selected", "true");
  span.tabIndex = 0;
  find("hint").hidden = true;
  find("shown").hidden = false;
  find("decision").classList.add("open");
  if (focus) span.focus({preventScroll: true});
  span.scrollIntoView({block: "nearest"});
  find("where").textContent = "token " + t + ", id " + turn.tokens[t].id;
  walkable();
  showDecision(turn.tokens[t], turn.greedy);
}

function walkable() {
  find("back").disabled = shown.t === 0;
  find("next").disabled = shown.t === shown.turn.tokens.length - 1;
  find("odd").disabled = !shown.turn.tokens.some(token => token.surprise >= 3);
}

function hide() {
  if (!shown) return;
  const span = shown.turn.spans[shown.t];
  span.setAttribute("aria-selected", "false");
  if (find("decision").contains(document.activeElement)) span.focus();
  shown = null;
  find("hint").hidden = false;
  find("shown").hidden = true;
  find("decision").classList.remove("open");
}

function odd(turn, at, focus) {
  const order = [...turn.tokens.keys()].map(i => (at + 1 + i) % turn.tokens.length);
  const t = order.find(t => turn.tokens[t].surprise >= 3);
  if (t !== undefined) select(turn, t, focus);
}

// The turn and index of a token in the log.
function placed(node) {
  const span = node.closest(".token"), turn = span && turns.find(turn => turn.spans.includes(span));
  return turn ? [turn, turn.spans.indexOf(span)] : null;
}
