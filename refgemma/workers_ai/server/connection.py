"""A connection that has to ask something: uvicorn itself waits for ever for the head of a request."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

from refgemma.workers_ai.server.limits import HEAD_SECONDS


class Connection(H11Protocol):
    """uvicorn's own, closed if at two looks in a row it has no request under way, and none was in between."""

    _look: asyncio.TimerHandle
    _idle_after: object = ()  # the request after which it was found idle; at first what is no request

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection."""
        super().connection_made(transport)
        self._look = self.loop.call_later(HEAD_SECONDS, self._close_if_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        """Let it go."""
        self._look.cancel()
        super().connection_lost(exc)

    def _close_if_idle(self) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self._idle_after is self.cycle:
            self.transport.close()
            return
        self._idle_after = self.cycle if idle else ()
        self._look = self.loop.call_later(HEAD_SECONDS, self._close_if_idle)
