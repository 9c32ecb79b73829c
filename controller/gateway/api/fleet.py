"""GET /fleet: workers and models as the controller knows them, as printed by `lorafleet status`.

Owns: the JSON's shape. Leaves to others: the numbers (the controller's worker_life.py), the table of it (status.py).
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from aiohttp import web

from lorafleet.controller.gateway.api.state import STATE
from lorafleet.controller.gateway.routing.routing_table import RoutingTable
from lorafleet.proto import controller_pb2, worker_pb2

STATUS_S: Final = 5.0
MAX_LACKING: Final = 100  # adapters named for each worker
MAX_MODELS: Final = 100  # models named, busiest first


async def show_fleet(request: web.Request) -> web.Response:
    """Return one object for each wanted worker; load, kv_usage and adapters are null while it starts."""
    state = request.app[STATE]
    status = await state.routes.status(STATUS_S)
    return web.json_response(
        {
            "object": "fleet",
            "table_version": status.version,
            "num_adapters": status.num_adapters,
            "workers": [_worker(worker) for worker in status.workers],
            "models": _models(state.table, [worker.report for worker in status.workers if worker.HasField("report")]),
        }
    )


def _models(table: RoutingTable, reports: Sequence[worker_pb2.WorkerReport]) -> list[dict[str, Any]]:
    """Return one object for each set of weights, which may have several names; the base model's is always included.

    tier: the fastest in which a worker has it. workers: how many have it there. Both are null for the base model.
    """
    names: dict[str, list[str]] = {}
    for entry in table.models.values():
        names.setdefault(entry.digest, []).append(entry.name)
    device = Counter(digest for report in reports for digest in report.device_adapters)
    host = Counter(digest for report in reports for digest in report.host_adapters)
    requests: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    rates: dict[str, float] = {}
    for use in (use for report in reports for use in report.uses):
        requests[use.digest] += use.num_requests
        tokens[use.digest] += use.num_output_tokens
        rates[use.digest] = rates.get(use.digest, 0.0) + use.output_tokens_per_s

    def rank(digest: str) -> tuple[Any, ...]:
        return not digest, requests[digest], rates.get(digest, 0.0), device[digest], host[digest], tokens[digest]

    return [
        {
            "names": names[digest],
            "tier": None if not digest else "device" if device[digest] else "host" if host[digest] else "disk",
            "workers": None if not digest else device[digest] or host[digest],
            "requests": requests[digest],
            "output_tokens": tokens[digest],
            "output_tokens_per_s": round(rates.get(digest, 0.0), 1),
        }
        for digest in heapq.nlargest(MAX_MODELS, names, key=rank)
    ]


def _worker(status: controller_pb2.WorkerStatus) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "name": status.name,
        "state": status.state,
        "ranks": status.num_ranks,
        "starts": status.num_starts,
        "worker_id": None,
        "generation": None,
        "load": None,
        "kv_usage": None,
        "adapters": None,
        "num_lacking": len(status.lacking),
        "lacking": [
            {"name": lacking.name, "reason": lacking.reason or "loading"} for lacking in status.lacking[:MAX_LACKING]
        ],
    }
    if not status.HasField("report"):
        return answer
    report = status.report
    load = report.load
    num_device, num_host = (
        len(report.device_adapters),
        len(set(report.host_adapters).difference(report.device_adapters)),
    )
    answer |= {
        "worker_id": report.worker_id,
        "generation": report.generation,
        "report_age_s": round(status.report_age_s, 1),
        "load": {"running": load.num_running, "waiting": load.num_waiting, "max_num_seqs": status.max_num_seqs},
        "kv_usage": round(1 - load.num_free_pages / load.num_pages, 3) if load.num_pages else 0.0,
        "adapters": {
            "device": num_device,
            "host": num_host,
            "disk": max(0, report.num_registered_adapters - num_device - num_host),
            "max_loras": status.max_loras,
        },
    }
    return answer
