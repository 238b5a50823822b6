"use strict";
// The conversation: sends questions, and shows the answers token by token.

let turns = [];      // {role, content, tokens, spans, ...}, in the order of the log
let running = null;  // AbortController of the answer in progress

const fail = message => { find("error").textContent = message; find("error").hidden = !message; };

function say(role, content, who) {
  const turn = {role, content, tokens: [], spans: [], box: make("div", "", "turn " + role), said: make("div", content, "said"), foot: make("p", "", "foot")};
  turn.said.dir = "auto";
  turn.box.append(make("p", who, "who"), turn.said);
  if (role === "assistant") {
    turn.said.setAttribute("role", "listbox");
    turn.said.setAttribute("aria-label", "Tokens of the answer; arrow keys move");
    turn.said.setAttribute("aria-orientation", "horizontal");
    turn.box.append(turn.foot);
    turn.box.classList.add("working");
  }
  find("log").append(turn.box);
  turns.push(turn);
  return turn;
}

function clear() {
  if (running) return;
  for (const turn of turns) turn.box.remove();
  turns = [];
  hide();
  find("welcome").hidden = false;
  showCode();
}

// New text scrolls the view only if it was at the end.
function following(change) {
  const log = find("log"), composer = find("composer");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  const inSight = composer.getBoundingClientRect().top < innerHeight;
  change();
  if (atEnd) log.scrollTop = log.scrollHeight;
  if (inSight && !wide.matches && shown === null) composer.scrollIntoView({block: "nearest"});
}

async function send() {
  const text = find("text").value;
  if (running || !text) return;
  fail("");
  if (!find("settings").checkValidity()) {
    find("more").open = true;
    find("settings").reportValidity();
    return;
  }
  const request = inputs(text), name = model().name;
  const who = [name.split("/").pop(), lora() && plain(lora().name)].filter(Boolean).join(" with ");
  if (!chatting()) clear();
  find("welcome").hidden = true;
  const asked = say("user", text, find("raw").checked ? "You, raw" : "You");
  const answer = say("assistant", "", who);
  answer.greedy = request.temperature !== undefined && request.temperature < 1e-5;
  following(() => {});
  if (chatting()) find("text").value = "";
  running = new AbortController();
  busy(true);
  let ending = "", failure = "";
  try {
    const response = await ask("playground/api/run", {method: "POST", body: JSON.stringify({model: name, inputs: request}), signal: running.signal});
    for await (const event of events(response)) {
      if (event.token) following(() => add(answer, event.token));
      else following(() => { ending = finish(answer, event.result); });
    }
  } catch (error) {
    if (error.name === "AbortError") ending = answer.foot.textContent = "stopped after " + count(answer.tokens.length, "token");
    else failure = error.message;
  }
  running = null;
  answer.box.classList.remove("working");
  if (failure || ending.startsWith("stopped")) {
    if (!answer.tokens.length) {
      // No answer: the question returns to the text field.
      for (const turn of [asked, answer]) turn.box.remove();
      turns = turns.filter(turn => turn !== asked && turn !== answer);
      find("welcome").hidden = turns.length > 0;
      if (!find("text").value) find("text").value = text;
    }
    fail(failure);
  }
  busy(false);
  // Screen readers read it once, at the end: token by token it would be noise.
  find("status").textContent = failure ? "" : "Answer: " + answer.content + " " + ending;
  showCode();
}

const count = (n, what) => n.toLocaleString("en") + " " + what + (n === 1 ? "" : "s");

function busy(yes) {
  const had = document.activeElement;
  find("stop").disabled = !yes;
  find("send").disabled = find("clear").disabled = yes;
  if (yes) find("status").textContent = "Answering";
  if (had === find(yes ? "send" : "stop")) find(yes ? "stop" : "send").focus();
}

function add(turn, token) {
  const span = tokenSpan(token, token.t);
  turn.tokens.push(token);
  turn.spans.push(span);
  turn.content += token.text;
  turn.said.append(span);
  if (turn.spans.length === 1) span.tabIndex = 0;
  turn.foot.textContent = count(turn.tokens.length, "token");
  if (shown && shown.turn === turn) walkable();
}

function finish(turn, result) {
  turn.content = result.response;
  const ended = result.finish_reason === "length" ? ", cut off at max tokens" : "";
  const summary = count(result.usage.prompt_tokens, "token") + " of prompt, " + count(result.usage.completion_tokens, "token") + " of answer" + ended;
  turn.foot.textContent = summary + ", seed " + result.seed + " ";
  const again = make("button", "use this seed", "text");
  again.type = "button";
  again.addEventListener("click", () => {
    find("seed").value = result.seed;
    find("seed").dispatchEvent(new Event("input", {bubbles: true}));
  });
  turn.foot.append(again);
  return summary;
}
