"""A server over a real socket, and a client that asks it."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import threading
import time
import urllib.parse

from rlrr_kernels.serve.app import create_app
from rlrr_kernels.serve.config import ServeConfig
from rlrr_kernels.serve.run import http_server
from rlrr_kernels.serve.service import Service
from tests.serve.served_adapters import PIXELS, png


@dataclasses.dataclass
class Answer:
    status: int
    headers: dict
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)


class Client:
    def __init__(self, port, token=None):
        self.port, self.token = port, token

    def request(self, method, path, body=None, headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            headers = {**({"Authorization": f"Bearer {self.token}"} if self.token else {}), **(headers or {})}
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())

    def get(self, path, **headers):
        return self.request("GET", path, headers=headers)

    def classify(self, adapter, body=None, query="", **headers):
        path = f"/v1/classify?adapter={urllib.parse.quote(adapter)}{query}"
        return self.request("POST", path, png() if body is None else body, headers)


@contextlib.contextmanager
def running(folder, token=None, **options):
    """A client of a server of this process, and its service."""
    config = ServeConfig(adapters=folder, image_size=PIXELS, cpu=True, port=0, **options)
    service = Service(config)
    server = http_server(create_app(service, token), config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        yield Client(server.servers[0].sockets[0].getsockname()[1], token), service
    finally:
        server.should_exit = True
        thread.join()
