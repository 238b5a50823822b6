"use strict";
// The playground: events of the user, and the initial state.

const wide = matchMedia("(min-width: 76rem)");
const fit = () => { find("more").open = wide.matches; };

find("log").addEventListener("click", event => {
  const place = placed(event.target);
  if (place) select(...place, true);
});
find("log").addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const place = placed(event.target);
  if (!place) return;
  const [turn, t] = place;
  const to = {ArrowRight: t + 1, ArrowLeft: t - 1, Home: 0, End: turn.tokens.length - 1, Enter: t, " ": t}[event.key];
  if (to !== undefined) { event.preventDefault(); select(turn, to, true); }
  else if (event.key === "s") odd(turn, t, true);
});
document.addEventListener("keydown", event => {
  if (event.key !== "Escape") return;
  if (running) running.abort();
  else hide();
});
find("text").addEventListener("keydown", event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
find("composer").addEventListener("submit", event => { event.preventDefault(); send(); });
find("settings").addEventListener("submit", event => { event.preventDefault(); send(); });
find("stop").addEventListener("click", () => running && running.abort());
find("clear").addEventListener("click", clear);
find("back").addEventListener("click", () => select(shown.turn, shown.t - 1, false));
find("next").addEventListener("click", () => select(shown.turn, shown.t + 1, false));
find("odd").addEventListener("click", () => odd(shown.turn, shown.t, false));
find("close").addEventListener("click", hide);
find("model").addEventListener("change", chooseModel);
find("lora").addEventListener("change", describe);
for (const id of ["settings", "composer"]) find(id).addEventListener("input", showCode);
for (const radio of find("composer").elements.form) radio.addEventListener("change", () => {
  find("systems").hidden = !chatting();
  find("text-label").textContent = chatting() ? "Message" : "Prompt";
  showCode();
});
for (const button of document.querySelectorAll("[data-copies]")) button.addEventListener("click", () => copy(button));
wide.addEventListener("change", fit);
find("door").addEventListener("submit", event => { event.preventDefault(); token = find("token").value; start(); });

async function start() {
  try {
    info = await (await ask("playground/api/info")).json();
  } catch (error) {
    find("door").hidden = error.status !== 401;
    find("notice").textContent = error.status === 401 && !token ? "" : error.message;
    return;
  }
  find("door").hidden = true;
  find("main").hidden = false;
  find("notice").textContent = info.notice;
  showLegend(info.legend);
  find("model").replaceChildren(...info.models.map(one => option(one.name, one.name)));
  find("text").placeholder = EXAMPLES[0];
  find("examples").replaceChildren(...EXAMPLES.map(text => {
    const button = make("button", text);
    button.type = "button";
    button.addEventListener("click", () => { find("text").value = text; send(); });
    return button;
  }));
  fit();
  chooseModel();
  if (wide.matches) find("text").focus();  // on small screens it would open a keyboard
}

start();
