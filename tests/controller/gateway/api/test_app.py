"""The routes of the application."""

from __future__ import annotations

from typing import Any

from lorafleet.controller.gateway.api.app import make_app


async def test_a_path_may_end_with_a_slash(fleet: Any) -> None:
    routes = [
        (route.method, route.resource.canonical.replace("{id}", "org/pirate"))
        for route in make_app(fleet.state).router.routes()
        if route.resource is not None and route.method != "HEAD"
    ]
    assert len(routes) > 20
    for method, path in routes:
        answers = []
        for written in (path.rstrip("/"), path.rstrip("/") + "/"):
            async with fleet.http.request(method, written, json={} if method == "POST" else None) as response:
                answers.append((response.status, (await response.read())[:20]))
        assert answers[0][0] in (200, 400), (path, answers)
        assert answers[0] == answers[1], path
