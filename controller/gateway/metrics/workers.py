"""The numbers of the workers' heartbeats, as gauges computed at the scrape.

Owns: `lorafleet_worker_*`. Leaves to others: the numbers (streams/session.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lorafleet.controller.gateway.routing.worker_view import Tier, WorkerView


class FleetCollector(Collector):
    """Yields one series for each worker in the table; the series of a worker that has left end."""

    def __init__(self, views: Callable[[], Sequence[WorkerView]]) -> None:
        self._views = views

    def collect(self) -> Iterable[Metric]:
        """Return the current gauges."""
        views = self._views()
        for name, help_text, value in _GAUGES:
            family = GaugeMetricFamily(name, help_text, labels=["worker"])
            for view in views:
                family.add_metric([view.worker_id], value(view))
            yield family

    def describe(self) -> Iterable[Metric]:
        """Return nothing: series are known only at the scrape."""
        return ()


def kv_usage(views: Iterable[WorkerView]) -> float:
    """Return the share of all `views`' KV pages in use, 0 to 1."""
    pages = [(view.num_pages, view.num_free_pages) for view in views if view.num_pages]
    num_pages = sum(total for total, _ in pages)
    return 1.0 - sum(free for _, free in pages) / num_pages if num_pages else 0.0


_GAUGES: tuple[tuple[str, str, Callable[[WorkerView], float]], ...] = (
    ("lorafleet_worker_ready", "1 if the worker takes requests from here", lambda view: float(view.ready)),
    ("lorafleet_worker_suspect", "1 if the worker is silent or its step hangs", lambda view: float(view.suspect)),
    ("lorafleet_worker_requests_running", "Requests in its batch", lambda view: view.num_running),
    ("lorafleet_worker_requests_waiting", "Requests in its queue", lambda view: view.num_waiting),
    ("lorafleet_worker_max_requests", "Seats in its batch", lambda view: view.max_num_seqs),
    ("lorafleet_worker_kv_cache_usage_ratio", "Share of its KV pages in use", lambda view: kv_usage([view])),
    ("lorafleet_worker_adapter_slots", "Device slots for adapters; 0: LoRA is off", lambda view: view.max_loras),
    ("lorafleet_worker_device_adapters", "Adapters in its device slots", lambda view: view.num_device_adapters),
    ("lorafleet_worker_host_adapters", "Adapters in its host tier but in no slot", lambda view: view.num_in(Tier.HOST)),
    (
        "lorafleet_worker_disk_adapters",
        "Adapters it has on disk only",
        lambda view: view.num_in(Tier.DISK),
    ),
    (
        "lorafleet_worker_host_cache_usage_ratio",
        "Share of its adapter host tier in use",
        lambda view: view.host_usage,
    ),
    ("lorafleet_worker_ranks", "Processes that share the model", lambda view: view.num_ranks),
    ("lorafleet_worker_generation", "When it started, in unix nanoseconds", lambda view: view.generation),
)
