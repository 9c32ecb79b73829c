"""GET /fleet, and `lorafleet status` of what it says."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator
from typing import Any

import pytest

from lorafleet.controller.commands.status import WATCH_S, fetch_fleet, table, watch
from lorafleet.proto import controller_pb2, worker_pb2
from lorafleet.workers.errors import LoRAFleetError, WorkerUnavailableError


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
    assert answer["models"][0]["names"] == ["tiny", "tiny-alias"]
    lines = table(answer).splitlines()
    assert lines[0].split() == [
        *("WORKER", "STATE", "RANKS", "GENERATION", "STARTS", "RUNNING", "WAITING", "KV", "DEVICE", "HOST", "DISK")
    ]
    assert lines[1].split()[:3] == ["one", "ready", "2"]
    assert lines[1].split()[5:] == ["1", "3/64", "2", "25%", "2/8", "1", "4"]
    assert lines[2].split() == ["two", "starting", "2", "-", "0", *"------"]
    assert lines[3] == "two lacks a0 (changed)"
    assert "two lacks 1 more" in lines and lines[-1].endswith("routing table version 5")


async def test_models_are_named_with_their_fastest_tier_and_what_they_do(fleet: Any) -> None:
    digests = {entry.name: entry.digest for entry in fleet.state.table.models.values()}
    pirate, tiny = digests["org/pirate"], digests["tiny"]
    uses = [
        worker_pb2.ModelUse(digest=pirate, num_requests=2, num_output_tokens=100, output_tokens_per_s=12.25),
        worker_pb2.ModelUse(digest=tiny, num_requests=1, num_output_tokens=7, output_tokens_per_s=0.5),
        worker_pb2.ModelUse(digest="unloaded", num_output_tokens=9),
    ]
    reports = [
        worker_pb2.WorkerReport(uses=uses, host_adapters=[pirate]),
        worker_pb2.WorkerReport(uses=uses[:1], device_adapters=[pirate], host_adapters=[pirate]),
    ]
    fleet.controller.status = controller_pb2.FleetStatus(
        workers=[controller_pb2.WorkerStatus(name="w", state="ready", report=report) for report in reports],
        num_adapters=len(digests) + 5,
    )
    _, text = await fleet.get("/fleet")
    answer = json.loads(text) if isinstance(text, str) else text
    base, busiest, *idle = answer["models"]
    assert base["names"][0] == "tiny" and (base["tier"], base["workers"], base["requests"]) == (None, None, 1)
    assert "org/pirate" in busiest["names"]
    assert {**busiest, "names": []} == {
        "names": [],
        "tier": "device",
        "workers": 1,
        "requests": 4,
        "output_tokens": 200,
        "output_tokens_per_s": 24.5,
    }
    assert all((model["tier"], model["requests"]) == ("disk", 0) for model in idle)
    lines = table(answer).splitlines()
    rows = [line.split() for line in lines[lines.index("") + 1 :]]
    assert rows[0] == ["MODEL", "TIER", "REQUESTS", "TOKENS/S", "TOKENS"]
    assert rows[1][-4:] == ["-", "1", "0.5", "7"]
    assert rows[2][-4:] == ["device", "4", "24.5", "200"]
    assert f"{len(digests) + 5} adapters (the busiest " in lines[-1]


def test_it_is_shown_again_until_somebody_has_seen_enough() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return is_terminal

    shown = iter(["one", "two", "three"])
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            raise KeyboardInterrupt

    is_terminal = True
    out = Terminal()
    watch(lambda: next(shown), out, sleep)
    assert out.getvalue() == "".join(f"\x1b[H\x1b[2J{text}\n" for text in ("one", "two", "three"))
    assert slept == [WATCH_S] * 3
    is_terminal, shown = False, iter(["one", "two", "three"])
    slept.clear()
    out = Terminal()
    watch(lambda: next(shown), out, sleep)
    assert out.getvalue() == "one\ntwo\nthree\n"


def test_a_watch_outlives_a_gateway_that_is_away_but_not_one_that_never_answered() -> None:
    shown: Iterator[str | BaseException] = iter(["one", WorkerUnavailableError("away"), "three", KeyboardInterrupt()])

    def show() -> str:
        text = next(shown)
        if isinstance(text, BaseException):
            raise text
        return text

    out = io.StringIO()
    watch(show, out, lambda seconds: None)
    assert out.getvalue() == "one\naway\nthree\n"
    shown = iter([WorkerUnavailableError("nowhere")])
    with pytest.raises(WorkerUnavailableError, match="nowhere"):
        watch(show, out, lambda seconds: None)


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
