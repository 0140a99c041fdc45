"""``ServeConfig``: what ``rlrr serve`` is told."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rlrr_kernels.train.config.files import check_types


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """A server.

    Args:
        adapters: folder of adapter folders, one a task, named as they are called there: DIR/<name>, or the run folders
            of ``rlrr finetune``, which hold theirs as DIR/<name>/adapter.
        model: the backbone's name in timm; None: what the first adapter says.
        weights: of the backbone: ``hub`` fetches them, ``none`` is a random start, anything else is a file
            (.safetensors, .pth, .npz); None: where the first adapter's came from, unless that was a file.
        image_size: pixels; None: what the adapters were trained at, else what the weights were made for.
        host: address to listen on; 0.0.0.0 is every network of this machine.
        port: to listen on.
        token_file: file with a token that requests have to bear (Authorization: Bearer ...); None: everybody may ask.
        batch_size: most images a forward pass.
        latency_ms: how long an image waits for others to share its forward pass, at most.
        queue: most requests that are being read, waiting or computed; more are answered 503.
        headers_timeout: seconds in which the headers of a connection's first request, or of its next after an answer,
            have to arrive; then it is closed.
        timeout: seconds from the end of a request's headers to its answer.
        body_mb: most megabytes of an image's file.
        pixels_mp: most megapixels of an image, as it is sent and while it is resized to the model's input.
        readers: threads that decode images.
        memory_mb: most megabytes of adapters in memory; those used longest ago are read again when they are asked for;
            None: no limit.
        shutdown_timeout: seconds that a stopped server takes at most to finish what it accepted.
        bf16: compute in bfloat16 where autocast does.
        cpu: leave a GPU alone.

    Raises:
        ValueError: a value is of another type or not allowed.
    """

    adapters: Path
    model: str | None = None
    weights: str | Path | None = None
    image_size: int | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    token_file: Path | None = None
    batch_size: int = 32
    latency_ms: float = 5.0
    queue: int = 256
    headers_timeout: float = 10.0
    timeout: float = 30.0
    body_mb: float = 16.0
    pixels_mp: float = 50.0
    readers: int = 2
    memory_mb: float | None = None
    shutdown_timeout: float = 30.0
    bf16: bool = False
    cpu: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        if self.latency_ms < 0:
            raise ValueError(f"latency_ms must be at least 0; got {self.latency_ms}")
        for name in ("batch_size", "queue", "readers", "image_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        for name in ("headers_timeout", "timeout", "shutdown_timeout", "body_mb", "pixels_mp", "memory_mb"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0; got {value}")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port must be from 0 to 65535; got {self.port}")

    def token(self) -> str | None:
        """What requests have to bear.

        Raises:
            ValueError: the file holds none.
            OSError: it cannot be read.
        """
        if self.token_file is None:
            return None
        token = self.token_file.read_text(encoding="utf-8", errors="replace").strip()
        if not token or not token.isascii() or not token.isprintable() or " " in token:
            raise ValueError(
                f"token_file must hold one token of printable ASCII without spaces; {self.token_file} does not"
            )
        return token
