// Runs one Worker with a binding env.AI that asks a server over HTTP, as the real one does:
// node worker_shim.mjs WORKER.mjs RUN_ADDRESS
import { pathToFileURL } from "node:url";

const [, , file, address] = process.argv;
const env = {
  AI: {
    async run(model, inputs) {
      const response = await fetch(`${address}/${model}`, { method: "POST", body: JSON.stringify(inputs) });
      if (!response.ok) {
        const [error] = (await response.json()).errors;
        throw Object.assign(new Error(`${error.code}: ${error.message}`), { name: "AiError" });
      }
      // An object where the type says so, else the stream itself.
      const whole = response.headers.get("content-type") === "application/json";
      return whole ? (await response.json()).result : response.body;
    },
  },
};

const worker = (await import(pathToFileURL(file))).default;
try {
  const response = await worker.fetch(new Request("http://worker.example/"), env);
  console.log(JSON.stringify({ type: response.headers.get("content-type"), body: await response.text() }));
} catch (error) {
  console.log(JSON.stringify({ thrown: `${error.name}: ${error.message}` }));
}
