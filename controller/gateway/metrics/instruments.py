"""The counters of this gateway, in a registry of its own.

Owns: the instruments and their labels. Leaves to others: vLLM's names for the same numbers (vllm.py), the workers'
numbers (workers.py).
"""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lorafleet.workers.errors import ERRORS

MAX_MODELS: Final = 200  # label values; requests for further models count under OTHER_MODELS
OTHER_MODELS: Final = "other"

_FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_GAP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 10.0)
_WHOLE_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


class Metrics:
    """All instruments of one gateway."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.http_requests = Counter(
            "lorafleet_http_requests", "HTTP requests answered", ["route", "status"], registry=registry
        )
        self.errors = Counter(
            "lorafleet_errors",
            "Requests answered with an error, by its code, including those that failed mid-stream",
            ["code"],
            registry=registry,
        )
        for error in ERRORS.values():
            self.errors.labels(error.code)  # at 0 from the start, since a rate would miss the first error
        self.in_flight = Gauge(
            "lorafleet_requests_in_flight", "Generation requests in progress in this gateway", registry=registry
        )
        self.choices = Counter(
            "lorafleet_choices",
            "Choices that ended, by finish reason (stop, length), and requests that failed (error, abort)",
            ["model", "finish_reason"],
            registry=registry,
        )
        self.resumed = Counter(
            "lorafleet_choices_resumed",
            "Choices that another worker resumed after theirs was lost",
            ["model"],
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "lorafleet_prompt_tokens", "Tokens of finished requests' prompts", ["model"], registry=registry
        )
        self.cached_tokens = Counter(
            "lorafleet_cached_prompt_tokens",
            "Tokens of finished requests' prompts that the workers had cached",
            ["model"],
            registry=registry,
        )
        self.generation_tokens = Counter(
            "lorafleet_generation_tokens", "Tokens generated", ["model"], registry=registry
        )
        self.first_token = Histogram(
            "lorafleet_time_to_first_token_seconds",
            "From a request's submission to its first token",
            ["model"],
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self.gap = Histogram(
            "lorafleet_inter_token_latency_seconds",
            "Between one arrival of tokens of a choice and the next",
            ["model"],
            buckets=_GAP_BUCKETS,
            registry=registry,
        )
        self.whole = Histogram(
            "lorafleet_e2e_request_latency_seconds",
            "From a request's submission to the end of its last choice",
            ["model"],
            buckets=_WHOLE_BUCKETS,
            registry=registry,
        )
        self._models: dict[str, ModelMetrics] = {}

    def model(self, name: str) -> ModelMetrics:
        """Return the instruments of an existing model; the label set is bounded, whatever clients ask for."""
        if name not in self._models and len(self._models) >= MAX_MODELS:
            name = OTHER_MODELS
        found = self._models.get(name)
        if found is None:
            found = self._models[name] = ModelMetrics(self, name)
        return found

    def render(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class ModelMetrics:
    """The instruments of one model, looked up once because they are called for every token."""

    __slots__ = ("_cached_tokens", "_choices", "_prompt_tokens", "_whole", "first_token", "gap", "resumed", "tokens")

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.first_token = metrics.first_token.labels(model).observe
        self.gap = metrics.gap.labels(model).observe
        self.resumed = metrics.resumed.labels(model).inc
        self.tokens = metrics.generation_tokens.labels(model).inc
        self._whole = metrics.whole.labels(model)
        self._prompt_tokens = metrics.prompt_tokens.labels(model)
        self._cached_tokens = metrics.cached_tokens.labels(model)
        self._choices = {
            reason: metrics.choices.labels(model, reason) for reason in ("stop", "length", "error", "abort")
        }

    def ended(self, reason: str) -> None:
        """Count a choice that ended (stop, length) or a request that failed (error, abort)."""
        self._choices[reason].inc()

    def finished(self, seconds: float, num_prompt_tokens: int, num_cached_tokens: int) -> None:
        """Count a request that succeeded. num_cached_tokens: tokens of its prompts that needed no computing."""
        self._whole.observe(seconds)
        self._prompt_tokens.inc(num_prompt_tokens)
        self._cached_tokens.inc(num_cached_tokens)
