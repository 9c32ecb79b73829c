"""GET /fleet: the workers as the controller knows them, what `lorafleet status` prints.

Owns: the JSON's shape. Leaves to others: the numbers (the controller's worker_life.py), the table of it (status.py).
"""

from __future__ import annotations

from typing import Any, Final

from aiohttp import web

from lorafleet.controller.gateway.api.state import STATE
from lorafleet.proto import controller_pb2

STATUS_S: Final = 5.0
MAX_LACKING: Final = 100  # adapters that are named for each worker


async def show_fleet(request: web.Request) -> web.Response:
    """One object for each wanted worker; load, kv_usage and adapters are null while it starts."""
    state = request.app[STATE]
    status = await state.routes.status(STATUS_S)
    return web.json_response(
        {
            "object": "fleet",
            "table_version": status.version,
            "num_adapters": status.num_adapters,
            "workers": [_worker(worker) for worker in status.workers],
        }
    )


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
