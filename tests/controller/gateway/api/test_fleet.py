"""GET /fleet, and `lorafleet status` of what it says."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from lorafleet.controller.commands.status import fetch_fleet, table
from lorafleet.proto import controller_pb2, worker_pb2
from lorafleet.workers.errors import LoRAFleetError


async def test_the_fleet_as_the_controller_knows_it(fleet: Any) -> None:
    report = worker_pb2.WorkerReport(
        worker_id="a",
        generation=1_700_000_000_000_000_000,
        load=worker_pb2.Load(num_running=3, num_waiting=2, num_pages=100, num_free_pages=75),
        device_adapters=["x", "y"],
        host_adapters=["x", "z"],
        num_registered_adapters=7,
    )
    lacking = [controller_pb2.LackingAdapter(name=f"a{number}", reason="changed") for number in range(101)]
    lacking[1].reason = ""
    fleet.controller.status = controller_pb2.FleetStatus(
        version=5,
        num_adapters=7,
        workers=[
            controller_pb2.WorkerStatus(
                name="one",
                state="ready",
                num_ranks=2,
                num_starts=1,
                report=report,
                report_age_s=0.25,
                max_num_seqs=64,
                max_loras=8,
            ),
            controller_pb2.WorkerStatus(name="two", state="starting", num_ranks=2, lacking=lacking),
        ],
    )
    status, text = await fleet.get("/fleet")
    answer = json.loads(text) if isinstance(text, str) else text
    assert status == 200
    assert (answer["object"], answer["table_version"], answer["num_adapters"]) == ("fleet", 5, 7)
    first, second = answer["workers"]
    assert first["load"] == {"running": 3, "waiting": 2, "max_num_seqs": 64}
    assert first["adapters"] == {"device": 2, "host": 1, "disk": 4, "max_loras": 8}
    assert (first["kv_usage"], first["generation"]) == (0.25, 1_700_000_000_000_000_000)
    assert (second["state"], second["load"], second["generation"]) == ("starting", None, None)
    assert (first["num_lacking"], second["num_lacking"], len(second["lacking"])) == (0, 101, 100)
    assert second["lacking"][:2] == [{"name": "a0", "reason": "changed"}, {"name": "a1", "reason": "loading"}]
    lines = table(answer).splitlines()
    assert lines[0].split() == [
        *("WORKER", "STATE", "RANKS", "GENERATION", "STARTS", "RUNNING", "WAITING", "KV", "DEVICE", "HOST", "DISK")
    ]
    assert lines[1].split()[:3] == ["one", "ready", "2"]
    assert lines[1].split()[5:] == ["1", "3/64", "2", "25%", "2/8", "1", "4"]
    assert lines[2].split() == ["two", "starting", "2", "-", "0", *"------"]
    assert lines[3] == "two lacks a0 (changed)"
    assert lines[-2:] == ["two lacks 1 more", "7 adapters, routing table version 5"]


async def test_it_needs_the_controller(fleet: Any) -> None:
    await fleet.controller.kill()
    status, _ = await fleet.get("/fleet")
    assert status == 503


async def test_the_gateways_address_may_take_any_form(fleet: Any) -> None:
    for path in ("/fleet", "/fleet/", "/v1/fleet", "/v1/fleet/"):
        status, text = await fleet.get(path)
        assert (status, json.loads(text)["object"]) == (200, "fleet")
    host = fleet.url.removeprefix("http://")
    for url in ("", "/", "/v1", "/v1/", "/fleet", "/v1/fleet", "//"):
        assert (await asyncio.to_thread(fetch_fleet, fleet.url + url, None))["object"] == "fleet"
    assert (await asyncio.to_thread(fetch_fleet, host, None))["object"] == "fleet"


@pytest.mark.parametrize("url", ["", "http://", "ftp://a", "http://a:port", "http://127.0.0.1:1/\x00", "http://[::1"])
def test_an_invalid_address_is_named(url: str) -> None:
    with pytest.raises(LoRAFleetError, match="--url"):
        fetch_fleet(url, None)


async def test_a_slash_at_the_end_of_a_path_changes_nothing(fleet: Any) -> None:
    for path in ("/health/", "/ready/", "/version/", "/metrics/", "/v1/models/", "/v1/models/org/pirate/"):
        assert await fleet.get(path) == await fleet.get(path.rstrip("/")) or path == "/metrics/"
        assert (await fleet.get(path))[0] == 200
    status, answer = await fleet.post("/v1/completions/", {"model": "tiny", "prompt": "hello", "max_tokens": 2})
    assert (status, len(answer["choices"])) == (200, 1)
