"""Runs the server until it is told to stop."""

from __future__ import annotations

import ipaddress
import logging
import math
import signal
import threading
from types import FrameType

import uvicorn
from fastapi import FastAPI

from rlrr_kernels.serve.app import create_app
from rlrr_kernels.serve.config import ServeConfig
from rlrr_kernels.serve.logs import log, write_logs
from rlrr_kernels.serve.protocol import TimedProtocol
from rlrr_kernels.serve.service import Service


def serve(config: ServeConfig) -> None:
    """Serves until SIGTERM or SIGINT, then finishes what was accepted; SIGHUP looks at the folder of adapters again.

    Raises:
        FileNotFoundError, ValueError, ConnectionError: as for :class:`rlrr_kernels.serve.service.Service` and
            :meth:`rlrr_kernels.serve.config.ServeConfig.token`.
    """
    token = config.token()
    write_logs()
    service = Service(config)
    if token is None and not _is_loopback(config.host):
        log(logging.WARNING, "everybody who reaches this address may ask: there is no --token-file", host=config.host)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, lambda number, frame: _rescan(service, frame))
    http_server(create_app(service, token), config).run()


def http_server(app: FastAPI, config: ServeConfig) -> uvicorn.Server:
    """What speaks HTTP for an application."""

    class Protocol(TimedProtocol):
        headers_timeout = config.headers_timeout

    return uvicorn.Server(
        uvicorn.Config(
            app,
            host=config.host,
            port=config.port,
            http=Protocol,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=math.ceil(config.shutdown_timeout),
        )
    )


def _rescan(service: Service, frame: FrameType | None) -> None:
    threading.Thread(target=_logged_rescan, args=(service,), name="rlrr-rescan").start()


def _logged_rescan(service: Service) -> None:
    try:
        service.rescan()
    except OSError as error:
        log(logging.ERROR, "the folder of adapters cannot be read", reason=str(error))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
