"""What Prometheus reads from a server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        options = {"registry": self.registry}
        self.requests = Counter(
            "rlrr_requests", "Classification requests, by status of the answer", ["status"], **options
        )
        self.seconds = Histogram(
            "rlrr_request_seconds", "From the start of a request to its answer", buckets=_SECONDS, **options
        )
        self.waiting_seconds = Histogram(
            "rlrr_batch_waiting_seconds", "How long a batch's oldest image waited", buckets=_SECONDS, **options
        )
        self.batch_seconds = Histogram("rlrr_batch_seconds", "Forward pass of a batch", buckets=_SECONDS, **options)
        self.batch_images = Histogram("rlrr_batch_images", "Images a batch", buckets=_SIZES, **options)
        self.batch_adapters = Histogram("rlrr_batch_adapters", "Adapters a batch", buckets=_SIZES, **options)
        self.open = Gauge("rlrr_open_requests", "Requests that are being read, waiting or computed", **options)
        self.adapters = Gauge("rlrr_adapters", "Adapters that can be asked for", **options)
        self.adapter_bytes = Gauge("rlrr_adapter_bytes", "Bytes of adapters in memory", **options)

    def text(self) -> bytes:
        """The metrics as Prometheus reads them."""
        return generate_latest(self.registry)
