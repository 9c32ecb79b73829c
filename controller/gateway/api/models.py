"""GET /v1/models and /v1/models/{id}: the base model's names and the adapters.

Owns: the shape; `unavailable` says why no worker has an adapter now. Leaves to others: the table
(routing/routing_table.py).
"""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from lorafleet.controller.gateway.api.auth import TENANT
from lorafleet.controller.gateway.api.state import STATE
from lorafleet.controller.gateway.routing.routing_table import ModelEntry, RoutingTable

_CARD_BYTES = 256


async def list_models(request: web.Request) -> web.Response:
    """List all valid values of `model`."""
    state = request.app[STATE]
    table = state.table
    body = await state.parse(request[TENANT], _CARD_BYTES * len(table.models), lambda: _list(table))
    return web.Response(body=body, content_type="application/json")


async def get_model(request: web.Request) -> web.Response:
    """Return one model; its name may contain slashes."""
    table = request.app[STATE].table
    name = request.match_info["id"]
    entry = table.models.get(name) or table.resolve(name.rstrip("/"))
    return web.Response(body=msgspec.json.encode(_card(entry, table)), content_type="application/json")


def _list(table: RoutingTable) -> bytes:
    return msgspec.json.encode({"object": "list", "data": [_card(entry, table) for entry in table.models.values()]})


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
