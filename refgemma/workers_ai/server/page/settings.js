"use strict";
// The settings: models, adapters, and a control for each parameter, with the range from the server.

let info = null;  // from /playground/api/info

const HINTS = {  // what the number does, and the slider's position while the step is off
  max_tokens: ["longest answer"],
  temperature: ["0 takes the most likely token"],
  top_p: ["keeps the likeliest tokens up to this mass; 1 and more is off", 1],
  top_k: ["keeps that many tokens", Infinity],
  seed: ["the same seed gives the same answer"],
  repetition_penalty: ["against tokens of prompt and answer; 1 is off", 1],
  frequency_penalty: ["against tokens of the answer, by count; 0 is off", 0],
  presence_penalty: ["against tokens of the answer, once; 0 is off", 0],
};

const model = () => info.models.find(one => one.name === find("model").value);
const lora = () => info.loras.find(one => one.id === find("lora").value);

// Names may come from an upload: characters that change the direction of text are not shown.
const plain = text => text.replace(/[\p{Cc}\p{Cf}]/gu, "");
const option = (value, text) => { const node = make("option", plain(text)); node.value = value; return node; };

function chooseModel() {
  find("answered").textContent = "answered by " + model().answered_by + "; context " + model().context.toLocaleString("en") + " tokens";
  const chosen = find("lora").value;
  const usable = info.loras.filter(one => one.models.includes(model().name));
  find("lora").replaceChildren(option("", "none"), ...usable.map(one => option(one.id, one.name)));
  if (usable.some(one => one.id === chosen)) find("lora").value = chosen;
  const given = Object.fromEntries([...document.querySelectorAll("#parameters input[type=number]")].map(input => [input.name, input.value]));
  find("parameters").replaceChildren(...model().parameters.map(one => parameter(one, given[one.name] || "")));
  describe();
}

function parameter({name, type, minimum, maximum, default: usual}, given) {
  const [hint, off] = HINTS[name] || [""];
  const box = make("div", "", "parameter"), label = make("label", name.replaceAll("_", " "));
  const input = make("input"), slider = make("input"), reset = make("button", "reset", "text"), note = make("p", "", "hint"), under = make("div", "", "under");
  const range = minimum.toLocaleString("en") + " to " + maximum.toLocaleString("en");
  note.textContent = range + (hint ? ": " + hint : "");
  note.id = name + "-hint";
  input.id = input.name = label.htmlFor = name;
  Object.assign(input, {type: "number", min: minimum, max: maximum, step: type === "integer" ? 1 : "any", value: given});
  input.placeholder = usual ?? (name === "seed" ? "random" : "off");
  input.setAttribute("aria-describedby", note.id);
  Object.assign(slider, {type: "range", min: minimum, max: maximum, step: type === "integer" ? 1 : 0.01});
  slider.setAttribute("aria-label", name.replaceAll("_", " ") + ", slider");
  reset.type = "button";
  reset.setAttribute("aria-label", name.replaceAll("_", " ") + ", back to the default");
  const show = () => {
    const unset = input.value === "" && input.validity.valid;
    box.classList.toggle("unset", unset);
    reset.hidden = unset;
    slider.value = unset ? Math.min(usual ?? off ?? minimum, maximum) : input.value;
  };
  input.addEventListener("input", show);
  slider.addEventListener("input", () => { input.value = slider.value; show(); });
  reset.addEventListener("click", () => { input.value = ""; show(); input.focus(); showCode(); });
  under.append(note, reset);
  box.append(label, input, ...(name === "seed" ? [] : [slider]), under);
  show();
  return box;
}

function describe() {
  find("about").textContent = lora() ? plain(lora().description) : "";
  showCode();
}
