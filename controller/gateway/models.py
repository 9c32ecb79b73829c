"""GET /v1/models and /v1/models/{id}: the base model's names and the adapters.

Owns: the shape; `unavailable` says why no worker has an adapter now. Leaves to others: the table (routing_table.py).
"""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from lorafleet.controller.gateway.routing_table import ModelEntry, RoutingTable
from lorafleet.controller.gateway.state import STATE


async def list_models(request: web.Request) -> web.Response:
    """All names that `model` may have."""
    table = request.app[STATE].table
    return _json({"object": "list", "data": [_card(entry, table) for entry in table.models.values()]})


async def get_model(request: web.Request) -> web.Response:
    """One of them; its name may hold slashes."""
    table = request.app[STATE].table
    return _json(_card(table.resolve(request.match_info["id"]), table))


def _card(entry: ModelEntry, table: RoutingTable) -> dict[str, Any]:
    card: dict[str, Any] = {
        "id": entry.name,
        "object": "model",
        "created": entry.created,
        "owned_by": "lorafleet",
        "root": entry.root,
        "parent": entry.parent,
        "max_model_len": table.max_model_len,
    }
    reason = table.unavailable(entry.digest) if entry.digest else None
    return card if reason is None else card | {"unavailable": reason}


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")
