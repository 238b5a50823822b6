"use strict";
// The request that Send would send, also as a program to copy.

const EXAMPLES = ["What is the capital of Nepal?", "What is 17 + 25?", "Tell me a story about a fox."];

const chatting = () => find("composer").elements.form.value === "chat";

// What Send would send now; in a chat without typed text, the request for its last answer.
function inputs(text) {
  const request = {};
  if (chatting()) {
    const past = turns.map(({role, content}) => ({role, content}));
    if (!text) while (past.length && past.at(-1).role === "assistant") past.pop();
    if (text || !past.length) past.push({role: "user", content: text || EXAMPLES[0]});
    const system = find("system").value;
    request.messages = system ? [{role: "system", content: system}, ...past] : past;
  } else request.prompt = text || EXAMPLES[0];
  if (find("raw").checked) request.raw = true;
  for (const input of document.querySelectorAll("#parameters input[type=number]"))
    if (input.value !== "") request[input.name] = Number(input.value);
  if (lora()) request.lora = info.loras.some(one => one !== lora() && one.name === lora().name) ? lora().id : lora().name;
  return request;
}

function showCode() {
  const address = new URL("client/v4/accounts/local/ai/run/" + encodeURI(model().name), document.baseURI).href;
  const request = inputs(find("text").value);
  find("curl").textContent = asCurl(address, request, token !== "");
  find("python").textContent = asPython(address, request, token !== "");
}

async function copy(button) {
  const pre = find(button.dataset.copies);
  try {
    await navigator.clipboard.writeText(pre.textContent);
  } catch (error) {  // pages served over plain http by another machine have no clipboard
    getSelection().selectAllChildren(pre);
    document.execCommand("copy");
  }
  button.textContent = find("status").textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 2000);
}
