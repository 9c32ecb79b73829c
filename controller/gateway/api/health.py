"""The state of the process: /health, /ping, /ready, /version, /metrics.

Owns: these endpoints. Leaves to others: the meaning of "ready" (state.py), the numbers (metrics/page.py).
"""

from __future__ import annotations

from importlib.metadata import version

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from lorafleet.controller.gateway.api.state import STATE


async def health(request: web.Request) -> web.Response:
    """Answer 200 as long as the process answers at all."""
    return web.Response()


async def ready(request: web.Request) -> web.Response:
    """Answer 200 if a worker can serve a request now, else 503 and the reason."""
    reason = request.app[STATE].not_ready_reason
    if reason is None:
        return web.Response(body=b'{"ready":true}', content_type="application/json")
    body = msgspec.json.encode({"ready": False, "reason": reason})
    return web.Response(status=503, body=body, content_type="application/json", headers={"Retry-After": "1"})


async def show_version(request: web.Request) -> web.Response:
    """Return the installed version."""
    body = msgspec.json.encode({"version": version("lorafleet")})
    return web.Response(body=body, content_type="application/json")


async def show_metrics(request: web.Request) -> web.Response:
    """Return the metrics in Prometheus' text format."""
    return web.Response(body=await request.app[STATE].metrics_page.get(), headers={"Content-Type": CONTENT_TYPE_LATEST})
