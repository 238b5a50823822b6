"""The playground: a page of plain files, and the interface that it uses.

Nothing is built, and nothing comes from another host; headers confine the page to this server. Tokens and decisions
look as on the page of a record.

``GET /playground/api/info``
    models, adapters, the parameters of each model with their ranges, and a notice where a stand-in answers.
``POST /playground/api/run``
    ``{"model": name, "inputs": {...}}``, the inputs those of ``…/ai/run``. Always a stream: ``{"token": {...}}`` per
    event, with its text, probability, candidates and what each sampling step did, as `refgemma.sampling.show` has it;
    then ``{"result": {...}}`` and ``[DONE]``.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from importlib import resources
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from refgemma.numerics import Array
from refgemma.sampling import Record, uniform
from refgemma.sampling.show.page import legend, token_data
from refgemma.version import __version__
from refgemma.workers_ai.ai import AI
from refgemma.workers_ai.answer import DONE, result, sse
from refgemma.workers_ai.errors import AiError
from refgemma.workers_ai.pages import page
from refgemma.workers_ai.request import MAX_TOKENS, TEMPERATURE, context_length
from refgemma.workers_ai.server.http import read_json, reply
from refgemma.workers_ai.server.limits import RECORDED, RECORDED_BYTES
from refgemma.workers_ai.server.native import answered_by
from refgemma.workers_ai.server.service import Prepared, Service
from refgemma.workers_ai.server.streaming import Answer, EventStream, after_last

_SCRIPTS = ("server.js", "settings.js", "code.js", "request.js", "conversation.js", "walk.js", "page.js")
# Path -> package, file, content type.
FILES = {
    "/": (__package__, "page/index.html", "text/html"),
    "/playground/page.css": (__package__, "page/page.css", "text/css"),
    "/playground/icon.svg": (__package__, "page/icon.svg", "image/svg+xml"),
    **{f"/playground/{name}": (__package__, f"page/{name}", "text/javascript") for name in _SCRIPTS},
    "/playground/decision.css": ("refgemma.sampling.show", "decision.css", "text/css"),
    "/playground/decision.js": ("refgemma.sampling.show", "decision.js", "text/javascript"),
}
# Scripts from this server only, none inline, and no way to turn a text into markup.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}
_NUMBERS = (
    "max_tokens", "temperature", "top_p", "top_k", "seed", "repetition_penalty", "frequency_penalty",
    "presence_penalty",
)  # fmt: skip


def routes(service: Service) -> list[Route]:
    """Make the routes of the page and of its interface."""
    places = asyncio.Semaphore(RECORDED)

    async def info(http: HttpRequest) -> Response:
        return reply(await asyncio.to_thread(_info, service))

    async def run(http: HttpRequest) -> ASGIApp:
        body = await read_json(http)
        if not isinstance(body, dict) or not isinstance(body.get("model"), str):
            raise AiError(5006, "the body is not as expected: an object with model and inputs")
        prepared = await service.preparation.run(_prepare, service, body["model"], body.get("inputs"))
        if places.locked():
            raise AiError(3040, f"{RECORDED} answers of the playground are in progress: try again later")
        await places.acquire()
        try:
            answer = await Answer(service, prepared, record=True).start()
        except BaseException:
            places.release()
            raise
        return _Released(EventStream(answer, _events(answer)), places)

    return [
        *(Route(path, _file(*where), methods=["GET"]) for path, where in FILES.items()),
        Route("/playground/api/info", info, methods=["GET"]),
        Route("/playground/api/run", run, methods=["POST"]),
    ]


def _file(package: str, name: str, kind: str) -> Callable[[HttpRequest], Awaitable[Response]]:
    content = resources.files(package).joinpath(name).read_bytes()

    async def send(http: HttpRequest) -> Response:
        return Response(content, headers=_HEADERS, media_type=kind)

    return send


class _Released:
    """A response that releases its place with its last bytes, or when it fails."""

    def __init__(self, app: ASGIApp, places: asyncio.Semaphore) -> None:
        self._app = app
        self._places: asyncio.Semaphore | None = places

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, after_last(send, self._release))
        finally:
            self._release()

    def _release(self) -> None:
        places, self._places = self._places, None
        if places is not None:
            places.release()


def _prepare(service: Service, model: str, inputs: Any) -> Prepared:
    """Prepare a request; its seed is drawn here, since showing a decision takes its uniform number."""
    prepared = service.prepare(model, inputs)
    settings = prepared.settings
    seed = settings.seed if settings.seed is not None else 1 + secrets.randbelow(9_999_999_999)
    most = min(settings.max_tokens, _most_tokens(service.ai, model))
    return replace(prepared, settings=replace(settings, seed=seed, max_tokens=most))


async def _events(answer: Answer) -> AsyncIterator[bytes]:
    tokens: list[int] = []
    logits: list[Array] = []
    async for event in answer:
        assert event.logits is not None  # it was recorded
        tokens.append(event.token)
        logits.append(event.logits)
        shown = await asyncio.to_thread(_shown, answer.prepared, tokens, logits, event.text)
        yield sse({"token": shown})
        if event.result is not None:
            done = await asyncio.to_thread(result, event.result, answer.prepared.request)
            yield sse({"result": {**done, "finish_reason": event.result.finish_reason, "seed": event.result.seed}})
    yield DONE


def _shown(prepared: Prepared, tokens: list[int], logits: list[Array], text: str) -> dict[str, Any]:
    """Return the last decision as the page of a record shows it."""
    t, seed = len(tokens) - 1, prepared.settings.seed
    assert seed is not None  # drawn above
    record = Record(
        params=prepared.settings,
        prompt_tokens=tuple(prepared.tokens),
        tokens=tuple(tokens),
        uniforms=tuple(uniform(seed, i) for i in range(len(tokens))),
        logits=logits,
        piece=prepared.gemma.tokenizer.piece,
    )
    return {"t": t, **token_data(record, t, text)}


def _most_tokens(ai: AI, model: str) -> int:
    """Return the longest answer that can be recorded: logits take four bytes per token and vocabulary entry."""
    gemma = ai.models[model]
    return max(1, min(context_length(model, gemma), RECORDED_BYTES // (4 * gemma.tokenizer.vocab_size)))


def _info(service: Service) -> dict[str, Any]:
    ai = service.ai
    stand_ins = [name for name in ai.models if ai.models[name].name == "tiny-it"]
    notice = "Here the small model that ships with refgemma answers, as a stand-in for Google's." if stand_ins else ""
    return {
        "version": __version__,
        "notice": notice,
        "models": [
            {
                "name": name,
                "answered_by": answered_by(name, ai),
                "stand_in": name in stand_ins,
                "context": context_length(name, ai.models[name]),
                "parameters": _parameters(ai, name),
            }
            for name in ai.models
        ],
        "loras": [
            {key: finetune[key] for key in ("id", "name", "description")}
            | {"models": [name for name in ai.models if service.usable(finetune, name)]}
            for finetune in service.finetunes.every()
        ],
        "legend": legend(),
    }


def _parameters(ai: AI, model: str) -> list[dict[str, Any]]:
    """List the controls: the ranges of the model's page, and the server's defaults, null where a step is off."""
    fields = page(model).fields("prompt")
    defaults = {"max_tokens": MAX_TOKENS, "temperature": TEMPERATURE}
    bounds = {"max_tokens": {"minimum": 1, "maximum": _most_tokens(ai, model)}}
    return [
        {
            "name": name,
            "type": fields[name]["type"],
            "minimum": fields[name].get("minimum"),
            "maximum": fields[name].get("maximum"),
            "default": fields[name].get("default", defaults.get(name)),
            **bounds.get(name, {}),
        }
        for name in _NUMBERS
    ]
