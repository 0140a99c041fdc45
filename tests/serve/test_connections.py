"""Clients that do not finish a request, damage it late, or read no answer: none holds a connection for ever."""

from __future__ import annotations

import contextlib
import logging
import socket
import time

import pytest

pytest.importorskip("fastapi", reason="needs fastapi, of the extra [serve]")
pytest.importorskip("prometheus_client", reason="needs prometheus-client, of the extra [serve]")
pytest.importorskip("uvicorn", reason="needs uvicorn, of the extra [serve]")

from rlrr_kernels.serve.service import Service
from tests.serve.client import running
from tests.serve.served_adapters import save_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("adapters"))


UNFINISHED = {
    "nothing": [b""],
    "half of the headers": [b"GET /healthz HTTP/1.1\r\nHost: x\r\n"],
    "headers that trickle": [b"GET /healthz HTTP/1.1\r\n", *[b"a: b\r\n"] * 30],
    "half of a second request": [b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /heal"],
    "a body that is not read": [b"POST /v1/classify?adapter=no HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n", b"a"],
}


@pytest.mark.parametrize("case", UNFINISHED)
def test_a_client_that_does_not_finish_a_request_is_cut_off(folder, case):
    with running(folder, headers_timeout=0.5) as (client, _):
        begin = time.monotonic()
        connection = socket.create_connection(("127.0.0.1", client.port), timeout=20)
        with connection, contextlib.suppress(ConnectionError):
            for part in UNFINISHED[case]:
                connection.sendall(part)
                time.sleep(0.1)
            while connection.recv(2**16):
                pass
        assert 0.4 < time.monotonic() - begin < 4  # uvicorn alone takes 5 s after an answer
        assert client.classify("cells").status == 200


def test_damage_after_the_answer_ends_the_connection(folder, caplog):
    begin = b"POST /v1/classify?adapter=no HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n"
    with running(folder) as (client, _):
        with socket.create_connection(("127.0.0.1", client.port), timeout=20) as connection:
            connection.sendall(begin)
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(2**16)
            assert answer.startswith(b"HTTP/1.1 404 ")
            connection.sendall(b"no number of a chunk\r\n")
            assert connection.recv(2**16) == b""
        assert client.classify("cells").status == 200
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_client_that_reads_no_answer_is_cut_off(folder, monkeypatch):
    monkeypatch.setattr("rlrr_kernels.serve.metrics.Metrics.text", lambda metrics: b"x" * 20_000_000)
    with running(folder, headers_timeout=0.5) as (client, _):
        with socket.create_connection(("127.0.0.1", client.port), timeout=20) as connection:
            connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            time.sleep(2)
            received = 0
            with contextlib.suppress(ConnectionError):
                while part := connection.recv(2**20):
                    received += len(part)
            assert received < 20_000_000
        with socket.create_connection(("127.0.0.1", client.port), timeout=20) as slow:
            slow.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            received = 0
            while received < 20_000_000:
                time.sleep(0.1)
                received += len(part := slow.recv(2**20, socket.MSG_WAITALL))
                assert part


def test_a_request_that_takes_longer_than_headers_may_is_answered(folder, monkeypatch):
    compute = Service._run
    monkeypatch.setattr(Service, "_run", lambda *args: (time.sleep(1), compute(*args))[1])
    with running(folder, headers_timeout=0.2) as (client, _):
        assert client.classify("cells").status == 200
