"""The same numbers under the names that vLLM's dashboards and the Gateway API's endpoint pickers expect.

Owns: the names and labels. Leaves to others: the numbers, which are read from our own instruments at each scrape, so
that nothing is counted twice.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lorafleet.controller.gateway.metrics.instruments import Metrics
from lorafleet.controller.gateway.metrics.page import Snapshot
from lorafleet.controller.gateway.metrics.workers import kv_usage
from lorafleet.controller.gateway.routing.routing_table import RoutingTable
from lorafleet.controller.gateway.routing.worker_view import Tier, WorkerView

_FINISHED = ("stop", "length", "abort")  # as vLLM counts; errors are no success


class VllmCollector(Collector):
    """Renames our instruments, and adds gauges over all workers together."""

    def __init__(
        self, metrics: Metrics, snapshot: Callable[[], Snapshot], clock: Callable[[], float] = time.time
    ) -> None:
        self._metrics = metrics
        self._snapshot = snapshot
        self._clock = clock

    def describe(self) -> Iterable[Metric]:
        """Return nothing: series are known only at the scrape."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Return the current series."""
        metrics = self._metrics
        for ours, names in (
            (metrics.first_token, ("vllm:time_to_first_token_seconds",)),
            (metrics.gap, ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds")),
            (metrics.whole, ("vllm:e2e_request_latency_seconds",)),
            (metrics.prompt_tokens, ("vllm:prompt_tokens", "vllm:prefix_cache_queries")),
            (metrics.cached_tokens, ("vllm:prefix_cache_hits",)),
            (metrics.generation_tokens, ("vllm:generation_tokens",)),
        ):
            for family in ours.collect():
                for name in names:
                    yield _renamed(family, name)
        for family in metrics.choices.collect():
            yield _renamed(family, "vllm:request_success", lambda labels: labels["finish_reason"] in _FINISHED)
        snapshot = self._snapshot()
        if snapshot.table is not None:
            yield from self._gauges(snapshot, snapshot.table)

    def _gauges(self, snapshot: Snapshot, table: RoutingTable) -> Iterable[Metric]:
        views = snapshot.views
        labels = {"model_name": table.base_name}
        for name, help_text, value in (
            ("vllm:num_requests_running", "Requests in the workers' batches", sum(view.num_running for view in views)),
            ("vllm:num_requests_waiting", "Requests in the workers' queues", sum(view.num_waiting for view in views)),
            ("vllm:kv_cache_usage_perc", "Share of the KV pages in use, 0 to 1", kv_usage(views)),
        ):
            family = GaugeMetricFamily(name, help_text, labels=list(labels))
            family.add_metric(list(labels.values()), value)
            yield family
        yield _cache_info(views)
        yield self._lora_info(snapshot, table)

    def _lora_info(self, snapshot: Snapshot, table: RoutingTable) -> Metric:
        """Return one series: the adapters on the devices and those that requests wait for."""
        views = snapshot.views
        on_device = {digest for view in views for digest, tier in view.tiers.items() if tier is Tier.DEVICE}
        adapters = [entry for entry in table.models.values() if entry.digest]
        running = sorted(entry.name for entry in adapters if entry.digest in on_device)
        waiting = sorted(set(snapshot.adapters_in_use).difference(running))
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters on the devices and adapters waited for, at a unix time",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        max_loras = max((view.max_loras for view in views), default=0)
        family.add_metric([str(max_loras), ",".join(running), ",".join(waiting)], self._clock())
        return family


def _cache_info(views: Iterable[WorkerView]) -> Metric:
    """Return one series per page size (in practice one); none before a worker has reported its number of pages."""
    num_pages: Counter[int] = Counter()
    for view in views:
        if view.num_pages:
            num_pages[view.page_size] += view.num_pages
    family = GaugeMetricFamily(
        "vllm:cache_config_info",
        "Tokens in a KV page, and the pages of all workers",
        labels=["block_size", "num_gpu_blocks"],
    )
    for page_size, total in num_pages.items():
        family.add_metric([str(page_size), str(total)], 1.0)
    return family


def _renamed(family: Metric, name: str, keep: Callable[[Mapping[str, str]], bool] = lambda labels: True) -> Metric:
    renamed = Metric(name, family.documentation, family.type)
    for sample in family.samples:
        if sample.name.endswith("_created") or not keep(sample.labels):
            continue
        labels = dict(sample.labels)
        labels["model_name"] = labels.pop("model")
        if "finish_reason" in labels:
            labels["finished_reason"] = labels.pop("finish_reason")
        renamed.add_sample(name + sample.name.removeprefix(family.name), labels, sample.value)
    return renamed
