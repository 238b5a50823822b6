"""Running the application on a port until a signal ends it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from refgemma.errors import InputError
from refgemma.workers_ai.server.limits import GRACE, HEAD_SECONDS, KEEP_ALIVE, LAST_GRACE
from refgemma.workers_ai.server.native import answered_by


class Connection(H11Protocol):
    """uvicorn's connection, which is closed if it is idle at two checks in a row, without a request between them.

    uvicorn itself waits forever for the head of a request.
    """

    _check: asyncio.TimerHandle
    _idle_after: object = ()  # the request after which it was last found idle; at first an object that is not one

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the checks."""
        super().connection_made(transport)
        self._check = self.loop.call_later(HEAD_SECONDS, self._close_if_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the checks."""
        self._check.cancel()
        super().connection_lost(exc)

    def _close_if_idle(self) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self._idle_after is self.cycle:
            self.transport.close()
            return
        self._idle_after = self.cycle if idle else ()
        self._check = self.loop.call_later(HEAD_SECONDS, self._close_if_idle)


class _Server(uvicorn.Server):
    """A server that ends its answers when it is stopped, and reports when it accepts requests."""

    def __init__(self, config: uvicorn.Config, app: Starlette, on_ready: Callable[[], object]) -> None:
        super().__init__(config)
        self._app = app
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # In a thread: closing takes locks, and a signal may interrupt their holder. The server itself waits for every
        # response, so each stream gets its end, or an error that says why it has none.
        threading.Thread(target=self._app.state.service.close, args=(GRACE,), name="refgemma-stop").start()
        super().handle_exit(sig, frame)


def serve(
    app: Starlette, host: str = "127.0.0.1", port: int = 8787, on_ready: Callable[[str], object] | None = None
) -> None:
    """Serve an application until SIGTERM or SIGINT.

    After a signal no more requests are accepted, answers have `GRACE` seconds to finish, then streams end with an
    error. After SIGTERM the exit status is that of a process ended by it, 143 in a shell.
    """
    listener = listen(host, port)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    config = uvicorn.Config(
        app,
        http=Connection,
        loop="asyncio",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=LAST_GRACE,
    )
    server = _Server(config, app, lambda: on_ready(address) if on_ready else None)
    with listener:
        server.run(sockets=[listener])
    if not server.started:
        raise OSError(f"the server on {address} did not start")


def listen(host: str, port: int) -> socket.socket:
    """Open the listening socket.

    Nagle's algorithm holds a small packet back until the previous one is acknowledged, which takes 40 ms if the client
    delays that. asyncio turns it off, but only on sockets that name their protocol, which those of
    `socket.create_server` do not.

    https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.create_connection
    """
    if not 0 <= port < 2**16:
        raise InputError(f"--port is {port}: expected 0 to 65535")
    try:
        made = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OSError(f"cannot listen on {host}, port {port}: {reason}; choose another with --port") from None
    return socket.socket(made.family, made.type, socket.IPPROTO_TCP, fileno=made.detach())


def hosts_of(host: str) -> tuple[str, ...]:
    """Return the host names that requests may use, or none if any is allowed."""
    local = host in ("localhost", "::1") or host.startswith("127.")
    return tuple(dict.fromkeys(("localhost", "127.0.0.1", "::1", host))) if local else ()


def state(app: Starlette, address: str) -> dict[str, Any]:
    """Describe what is served, for programs."""
    service = app.state.service
    return {
        "address": address,
        "models": {name: answered_by(name, service.ai) for name in service.ai.models},
        "finetunes": [finetune["name"] for finetune in service.finetunes.every()],
    }


def greeting(app: Starlette, address: str) -> str:
    """Describe what is served, for people."""
    served = state(app, address)
    lines = [f"{name}: {what}" for name, what in served["models"].items()]
    lines.append(f"finetunes: {', '.join(served['finetunes']) or 'none yet'}")
    lines.append(f"{address}/client/v4/accounts/ACCOUNT/ai/run/MODEL, any ACCOUNT; playground: {address}/")
    return "\n".join(lines)
