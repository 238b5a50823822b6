"use strict";
// A request as a program that sends it: with curl in a shell, or in Python with the standard library.

// Invisible characters and those that change the direction of text are escaped.
const unseen = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}]/gu;
const hex = (value, digits) => value.toString(16).padStart(digits, "0");
const jsonString = text => JSON.stringify(text).replace(unseen, character =>
  [...Array(character.length).keys()].map(i => "\\u" + hex(character.charCodeAt(i), 4)).join(""));
const pythonString = text => JSON.stringify(text).replace(unseen, character =>
  character.length > 1 ? "\\U" + hex(character.codePointAt(0), 8) : "\\u" + hex(character.charCodeAt(0), 4));

// A value as source code: objects, and lists inside them, one entry per line; deeper values on one line.
function source(value, words, depth = 0) {
  if (typeof value === "string") return words.string(value);
  if (typeof value === "boolean") return value ? words.yes : words.no;
  if (typeof value !== "object") return String(value);
  const list = Array.isArray(value);
  const parts = list ? value.map(item => source(item, words, depth + 1))
    : Object.entries(value).map(([key, item]) => words.string(key) + ": " + source(item, words, depth + 1));
  const [open, close] = list ? "[]" : "{}";
  if (depth > 1) return open + parts.join(", ") + close;
  const line = "\n" + "    ".repeat(depth);
  return open + parts.map(part => line + "    " + part).join(",") + line + close;
}

const quoted = text => "'" + text.replaceAll("'", "'\\''") + "'";

function asCurl(address, inputs, guarded) {
  const body = source(inputs, {string: jsonString, yes: "true", no: "false"});
  const head = guarded ? ' \\\n  -H "Authorization: Bearer $REFGEMMA_TOKEN"' : "";
  return "curl " + quoted(address) + head + " \\\n  -d " + quoted(body);
}

function asPython(address, inputs, guarded) {
  const body = source(inputs, {string: pythonString, yes: "True", no: "False"});
  return "import json\n" + (guarded ? "import os\n" : "") + "import urllib.request\n\n"
    + "inputs = " + body + "\n"
    + "request = urllib.request.Request(\n    " + pythonString(address) + ",\n    data=json.dumps(inputs).encode(),\n"
    + (guarded ? '    headers={"Authorization": "Bearer " + os.environ["REFGEMMA_TOKEN"]},\n' : "") + ")\n"
    + "with urllib.request.urlopen(request) as answer:\n    print(json.load(answer)[\"result\"][\"response\"])\n";
}
