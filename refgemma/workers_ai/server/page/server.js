"use strict";
// Requests to the server, and reading its errors and its stream of events.

let token = "";  // if the server requires one; never stored

const headers = () => token ? {authorization: "Bearer " + token} : {};
// The sentence of an error, without prefixes that repeat its kind.
const sentence = envelope => envelope.errors[0].message.replace(/^(AiError: |Bad input: |Error: )+/, "");

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, {...options, headers: headers(), cache: "no-store"});
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer: is refgemma serve still running?");
  }
  if (response.ok) return response;
  const failure = new Error("The server answered with status " + response.status + ".");
  try { failure.message = sentence(await response.json()); } catch (error) { /* not from refgemma */ }
  failure.status = response.status;
  throw failure;
}

// Server-sent events of a response; without a final [DONE] it was cut off.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const {value, done} = await reader.read().catch(error => {
      if (error.name === "AbortError") throw error;
      return {done: true};
    });
    if (done) throw new Error("The answer broke off: the server closed the connection.");
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.errors) throw new Error(sentence(event));
      yield event;
    }
  }
}
