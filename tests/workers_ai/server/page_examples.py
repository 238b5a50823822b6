"""The requests that the two model pages show, transcribed as data; nothing in them was changed.

References
----------
https://developers.cloudflare.com/workers-ai/models/gemma-2b-it-lora/ and .../gemma-7b-it-lora/
"""

BASE = "https://api.cloudflare.com"

PYTHON_2B = """\
import os
import requests
ACCOUNT_ID = "your-account-id"
AUTH_TOKEN = os.environ.get("CLOUDFLARE_AUTH_TOKEN")
prompt = "Tell me all about PEP-8"
response = requests.post(
f"https://api.cloudflare.com/client/v4/accounts/{ACCOUNT_ID}/ai/run/@cf/google/gemma-2b-it-lora",
headers={"Authorization": f"Bearer {AUTH_TOKEN}"},
json={
"messages": [
{"role": "system", "content": "You are a friendly assistant"},
{"role": "user", "content": prompt}
]
}
)
result = response.json()
print(result)
"""

CURL_2B = r"""
curl https://api.cloudflare.com/client/v4/accounts/$CLOUDFLARE_ACCOUNT_ID/ai/run/@cf/google/gemma-2b-it-lora \
-X POST \
-H "Authorization: Bearer $CLOUDFLARE_AUTH_TOKEN" \
-d '{ "messages": [{ "role": "system", "content": "You are a friendly assistant" }, { "role": "user", "content": "Why is pizza so good" }]}'
"""  # noqa: E501

CURL_7B = r"""
curl https://api.cloudflare.com/client/v4/accounts/$CLOUDFLARE_ACCOUNT_ID/ai/run/@cf/google/gemma-7b-it-lora \
-X POST \
-H "Authorization: Bearer $CLOUDFLARE_AUTH_TOKEN" \
-d '{
"prompt": "tell me a story",
"raw": "true",
"lora": "00000000-0000-0000-0000-000000000"
}'
"""

WORKER_2B_STREAM = """\
export interface Env {
AI: Ai;
}
export default {
async fetch(request, env): Promise<Response> {
const messages = [
{ role: "system", content: "You are a friendly assistant" },
{
role: "user",
content: "What is the origin of the phrase Hello, World",
},
];
const stream = await env.AI.run("@cf/google/gemma-2b-it-lora", {
messages,
stream: true,
});
return new Response(stream, {
headers: { "content-type": "text/event-stream" },
});
},
} satisfies ExportedHandler<Env>;
"""

WORKER_2B = """\
export interface Env {
AI: Ai;
}
export default {
async fetch(request, env): Promise<Response> {
const messages = [
{ role: "system", content: "You are a friendly assistant" },
{
role: "user",
content: "What is the origin of the phrase Hello, World",
},
];
const response = await env.AI.run("@cf/google/gemma-2b-it-lora", { messages });
return Response.json(response);
},
} satisfies ExportedHandler<Env>;
"""

WORKER_7B = """\
export interface Env {
AI: Ai;
}
export default {
async fetch(request, env): Promise<Response> {
const response = await env.AI.run("@cf/google/gemma-7b-it-lora", {
prompt: "tell me a story",
raw: true, //skip applying the default chat template
lora: "00000000-0000-0000-0000-000000000", //the finetune id OR name
});
return Response.json(response);
},
} satisfies ExportedHandler<Env>;
"""

# Of the page's section on prompting, both for the 7B model.
UNSCOPED = {"prompt": "tell me a joke about cloudflare"}
MISTRAL_STYLE = {
    "prompt": "<s>[INST]comedian[/INST]</s>\n[INST]tell me a joke about cloudflare[/INST]",
    "raw": True,
}

PLACEHOLDER = "00000000-0000-0000-0000-000000000"
TYPES = ("export interface Env {\nAI: Ai;\n}\n", ": Promise<Response>", " satisfies ExportedHandler<Env>")
