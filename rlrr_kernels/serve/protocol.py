"""HTTP connections that do not wait for a client longer than they may."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class TimedProtocol(H11Protocol):
    """uvicorn's connection, which is cut off where no request is at work and the client lets ``headers_timeout`` pass.

    uvicorn itself limits only the silence after an answer: not the time before the first request, nor that which its
    headers take, nor the rest of a body whose request is answered already, nor an answer that nobody reads.
    """

    headers_timeout: float

    _timer: asyncio.TimerHandle | None = None
    _unsent = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # the answer went out before the rest of the request: there is no second one
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._unsent = self.transport.get_write_buffer_size()
        self._timer = self.loop.call_later(self.headers_timeout, self._look)

    def _look(self) -> None:
        cycle: Any = self.cycle
        if cycle is not None and not cycle.response_complete:
            return  # its answer waits again
        if self.transport.get_write_buffer_size() < self._unsent:
            self._wait()  # a slow line
        else:
            self.transport.abort()
