"""What the server counts, as Prometheus reads it."""

from __future__ import annotations

import mlx.core as mx
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from ..integrations.supervision import SupervisedGenerator
from .answer import Usage

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_KINDS = ("prompt_read", "prompt_cached", "generated")


class Metrics:
    """Counters and gauges of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "mlx_tq_requests",
            "Requests by path and status; 499: the client hung up.",
            ("path", "status"),
            registry=self.registry,
        )
        self._tokens = Counter(
            "mlx_tq_tokens",
            "Tokens of prompts that were read, of prompts that were reused, and "
            "generated.",
            ("kind",),
            registry=self.registry,
        )
        for kind in _KINDS:
            self._tokens.labels(kind)
        self.first_token = Histogram(
            "mlx_tq_first_token_seconds",
            "From a request to its first token.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.whole = Histogram(
            "mlx_tq_request_seconds",
            "From a request to the end of its answer.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        gauge = {
            "mlx_tq_requests_running": "Requests that are read or answered.",
            "mlx_tq_requests_waiting": "Requests that wait for their turn.",
            "mlx_tq_cache_bytes": "Bytes of texts kept for reuse, or lent to requests.",
            "mlx_tq_cache_texts": "Texts kept for reuse.",
            "mlx_tq_reserved_bytes": "Bytes set aside for requests that run.",
            "mlx_tq_memory_bytes": "What --kv-memory allows; 0 without.",
            "mlx_tq_mlx_active_bytes": "Bytes that MLX's arrays take.",
            "mlx_tq_mlx_cache_bytes": "Bytes that MLX keeps for further arrays.",
            "mlx_tq_faults": "How often the generation thread had to begin anew.",
        }
        self._gauges = {
            name: Gauge(name, text, registry=self.registry)
            for name, text in gauge.items()
        }

    def count(self, usage: Usage) -> None:
        """Count the tokens of an answer, whole or broken off."""
        counts = (usage.prompt - usage.cached, usage.cached, usage.generated)
        for kind, tokens in zip(_KINDS, counts, strict=True):
            self._tokens.labels(kind).inc(tokens)

    def text(self, generator: SupervisedGenerator) -> bytes:
        """All of it, in Prometheus's text format."""
        admission = generator.admission
        tickets = generator.open_tickets()
        running = sum(ticket.started for ticket in tickets)
        texts, nbytes = generator.kept
        now = {
            "mlx_tq_cache_bytes": nbytes,
            "mlx_tq_cache_texts": texts,
            "mlx_tq_requests_running": running,
            "mlx_tq_requests_waiting": len(tickets) - running,
            "mlx_tq_reserved_bytes": sum(ticket.reserved for ticket in tickets),
            "mlx_tq_memory_bytes": admission.budget if admission else 0,
            "mlx_tq_mlx_active_bytes": mx.get_active_memory(),
            "mlx_tq_mlx_cache_bytes": mx.get_cache_memory(),
            "mlx_tq_faults": generator.faults,
        }
        for name, value in now.items():
            self._gauges[name].set(value)
        return generate_latest(self.registry)
