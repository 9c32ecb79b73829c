"""The worker's gRPC service: who is admitted, its reports, the end of sessions and of the worker."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import pytest
from fake_worker import GENERATION, TIMEOUT_S, TOKEN, WORKER_ID, Worker, eventually, status

from lorafleet.proto import worker_pb2
from lorafleet.workers.rpc import bearer
from lorafleet.workers.server import service as service_module


@pytest.mark.parametrize("wrong", [{"worker_id": "worker-b"}, {"generation": 6}])
async def test_a_hello_for_another_worker_is_refused(worker: Worker, wrong: dict[str, Any]) -> None:
    async def greet() -> None:
        async with worker.session(**wrong):
            pytest.fail("welcomed")

    assert await status(greet()) is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_session_that_does_not_begin_with_hello_is_refused(worker: Worker) -> None:
    async with worker.channel() as stub:
        call = stub.Session(metadata=bearer(TOKEN))
        await call.write(worker_pb2.GatewayMessage(cancel=worker_pb2.Cancel(stream=1)))
        assert await status(call.read()) is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_session_without_hello_times_out(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "HELLO_TIMEOUT_S", 0.05)
    async with worker.channel() as stub:
        assert await status(stub.Session(metadata=bearer(TOKEN)).read()) is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("metadata", [None, bearer("wrong"), (("authorization", TOKEN),)])
async def test_every_call_needs_the_fleets_token(worker: Worker, metadata: Any) -> None:
    async with worker.channel() as stub:
        calls = [
            stub.GetReport(worker_pb2.ReportRequest(), metadata=metadata),
            stub.Drain(worker_pb2.DrainRequest(), metadata=metadata),
            stub.Session(metadata=metadata).read(),
        ]
        for call in calls:
            assert await status(call) is grpc.StatusCode.UNAUTHENTICATED


async def test_heartbeats_say_how_the_worker_is(worker: Worker) -> None:
    async with worker.session() as client:
        await client.read_until(lambda: len(client.heartbeats) == 2)
        heartbeat = client.heartbeats[-1]
        assert heartbeat.state == worker_pb2.WORKER_READY
        assert heartbeat.last_step_age_ms == 250
        assert (heartbeat.load.num_pages, heartbeat.load.num_free_pages) == (10, 4)
        assert heartbeat.num_gateways == 1
        assert heartbeat.pace.step_s == pytest.approx(0.03)
        told = [[(place.digest, place.tier) for place in beat.adapters] for beat in client.heartbeats]
        assert told == [
            [
                ("digest-a", worker_pb2.ADAPTER_DEVICE),
                ("digest-b", worker_pb2.ADAPTER_HOST),
                ("digest-c", worker_pb2.ADAPTER_DISK),
            ],
            [],
        ]
        worker.engine.device_adapters = ()
        worker.engine.registered_adapters = ("digest-a", "digest-c")
        await client.read_until(lambda: len(client.heartbeats) == 3)
        assert [(place.digest, place.tier) for place in client.heartbeats[-1].adapters] == [
            ("digest-a", worker_pb2.ADAPTER_HOST),
            ("digest-b", worker_pb2.ADAPTER_ABSENT),
        ]


async def test_a_report_has_identity_load_and_counters(worker: Worker) -> None:
    async with worker.channel() as stub:
        report = await stub.GetReport(worker_pb2.ReportRequest(), metadata=bearer(TOKEN), timeout=TIMEOUT_S)
    assert (report.worker_id, report.generation, report.state) == (WORKER_ID, GENERATION, worker_pb2.WORKER_READY)
    assert list(report.host_adapters) == ["digest-a", "digest-b"]
    assert (report.counters.num_steps, report.counters.num_output_tokens) == (3, 5)
    assert (report.counters.num_prefix_query_tokens, report.counters.num_prefix_hit_tokens) == (70, 32)


async def test_a_draining_worker_finishes_what_runs_and_refuses_the_rest(worker: Worker) -> None:
    worker.engine.paused = True
    async with worker.session() as client, worker.channel() as stub:
        await client.generate(1, [1])
        await eventually(lambda: worker.engine.num_running == 1)
        reply = await stub.Drain(worker_pb2.DrainRequest(), metadata=bearer(TOKEN), timeout=TIMEOUT_S)
        assert reply.num_unfinished == 1
        await client.generate(2, [2])
        ended = (await client.ending(2)).ended
        assert ended is not None and ended.error_code == "draining"
        worker.engine.resume()
        assert (await client.ending(1)).finish == worker_pb2.FINISH_LENGTH
        await client.read_until(lambda: bool(client.heartbeats) and client.heartbeats[-1].state == 2)
        reply = await stub.Drain(worker_pb2.DrainRequest(), metadata=bearer(TOKEN), timeout=TIMEOUT_S)
        assert reply.num_unfinished == 0


async def test_the_end_of_a_session_cancels_its_requests_and_no_others(worker: Worker) -> None:
    worker.engine.paused = True
    async with worker.session() as stays:
        await stays.generate(1, [1])
        async with worker.session() as leaves:
            for stream in (1, 2, 3):
                await leaves.generate(stream, [stream])
            await eventually(lambda: worker.engine.num_running == 4)
        await eventually(lambda: worker.engine.num_running == 1)
        assert worker.service.num_unfinished == 1
        worker.engine.resume()
        await stays.ending(1)


async def test_a_gateway_that_does_not_read_loses_its_session_and_holds_up_nobody(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "MAX_UNREAD", 64)
    worker.engine.paused = True
    async with worker.session() as reads, worker.session() as sleeps:
        # Twenty log-probabilities per row soon fill gRPC's own buffers.
        for stream in range(1, 33):
            await sleeps.generate(stream, [1], max_tokens=2**20, sampling={"logprobs": 20})
        await eventually(lambda: worker.engine.num_running == 32)
        worker.engine.resume()
        await eventually(lambda: worker.engine.num_running == 0)
        await reads.generate(1, [1])
        assert (await reads.ending(1)).finish == worker_pb2.FINISH_LENGTH
        assert worker.service.num_unfinished == 0


async def test_when_the_engine_crashes_every_request_is_told_before_the_process_ends(worker: Worker) -> None:
    worker.engine.paused = True
    async with worker.session() as one, worker.session() as other:
        await one.generate(1, [1])
        await other.generate(1, [1])
        await other.generate(2, [1])
        await eventually(lambda: worker.engine.num_running == 3)
        worker.engine.crash = True
        worker.engine.wake()
        for client, stream in ((one, 1), (other, 1), (other, 2)):
            ended = (await client.ending(stream)).ended
            assert ended is not None and ended.error_code == "internal_error"
        async with asyncio.timeout(TIMEOUT_S):
            await worker.crashed.wait()


async def test_when_a_step_cannot_be_delivered_nobody_waits_for_its_tokens(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(step: int, events: object) -> None:
        raise ZeroDivisionError

    worker.engine.paused = True
    async with worker.session() as one, worker.session() as other:
        await one.generate(1, [1])
        await other.generate(1, [1])
        await eventually(lambda: worker.engine.num_running == 2)
        monkeypatch.setattr(worker.service, "_deliver", fail)
        worker.engine.resume()
        for client in (one, other):
            ended = (await client.ending(1)).ended
            assert ended is not None and ended.error_code == "internal_error"
        async with asyncio.timeout(TIMEOUT_S):
            await worker.crashed.wait()
