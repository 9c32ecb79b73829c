"""The HTTP application: routes, middlewares, start and end.

Owns: the handler of each path. Leaves to others: listening (gateway/listener.py), signals (gateway/server.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from aiohttp import web
from aiohttp.typedefs import Handler

from lorafleet.controller.gateway.api import adapters, chat, completions, fleet, health, models, tokenization
from lorafleet.controller.gateway.api.access_log import AccessLog
from lorafleet.controller.gateway.api.auth import ApiKeys, auth_middleware
from lorafleet.controller.gateway.api.cors import preflight_middleware
from lorafleet.controller.gateway.api.errors import error_middleware
from lorafleet.controller.gateway.api.response_headers import response_headers
from lorafleet.controller.gateway.api.state import STATE, GatewayState
from lorafleet.controller.gateway.tenants import tenants_of


def make_app(state: GatewayState, access_log: AccessLog | None = None) -> web.Application:
    """Return the application, which starts and closes `state`."""
    config = state.config
    keys = ApiKeys(
        tenants_of(config.api_keys, config.tenants, config.admin_api_keys),
        is_open=not (config.api_keys or config.tenants),
    )
    app = web.Application(
        middlewares=[
            *([access_log.middleware] if access_log else []),
            _count_requests,
            error_middleware,
            preflight_middleware(config.cross_origin),
            auth_middleware(keys),
        ],
    )
    app[STATE] = state
    app.cleanup_ctx.append(_life)
    app.on_response_prepare.append(response_headers(config.cross_origin))
    for add, path, handler in (
        (web.get, "/health", health.health),
        (web.get, "/ping", health.health),
        (web.get, "/ready", health.ready),
        (web.get, "/version", health.show_version),
        (web.get, "/metrics", health.show_metrics),
        (web.get, "/fleet", fleet.show_fleet),
        (web.get, "/v1/fleet", fleet.show_fleet),  # for those who know only the API's base URL
        (web.get, "/v1/models", models.list_models),
        (web.post, "/v1/completions", completions.create_completion),
        (web.post, "/v1/chat/completions", chat.create_chat_completion),
        (web.post, "/v1/load_lora_adapter", adapters.load_adapter),
        (web.post, "/v1/unload_lora_adapter", adapters.unload_adapter),
        (web.post, "/tokenize", tokenization.tokenize),
        (web.post, "/detokenize", tokenization.detokenize),
    ):
        app.add_routes([add(path, handler), add(path + "/", handler)])
    app.add_routes([web.get("/v1/models/{id:.+}", models.get_model)])
    return app


async def _life(app: web.Application) -> AsyncIterator[None]:
    app[STATE].start()
    yield
    await app[STATE].close()


@web.middleware
async def _count_requests(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Count every answer by route and status; 499 if the client disconnected."""
    resource = request.match_info.route.resource
    route = resource.canonical.rstrip("/") if resource is not None else "unmatched"
    status = "500"
    try:
        response = await handler(request)
        status = str(response.status)
        return response
    except asyncio.CancelledError:
        status = "499"
        raise
    finally:
        request.app[STATE].metrics.http_requests.labels(route, status).inc()
