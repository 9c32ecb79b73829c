"""Clients that leave, workers that die or hang, controllers that restart."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

from lorafleet.controller.gateway.routing.routing_table import RoutingTable
from lorafleet.controller.gateway.streams import pool as pool_module
from lorafleet.controller.gateway.streams.placing import MAX_LOST
from lorafleet.proto import worker_pb2
from lorafleet.workers.errors import QueueFullError
from lorafleet.workers.text.model_text import ModelText

BODY = {"model": "tiny", "prompt": "hello world", "max_tokens": 30}


async def test_a_client_that_leaves_in_mid_stream_cancels_all_its_choices(fleet: Any) -> None:
    fleet.worker.permits = 3
    async with fleet.http.post("/v1/completions", json=BODY | {"stream": True, "n": 3}) as response:
        await response.content.readuntil(b"\n\n")
        response.close()
    await fleet.until(lambda: sorted(fleet.worker.cancels) == [1, 2, 3])
    await fleet.until(lambda: fleet.state.intake.num_in_flight == 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_before_the_first_token_cancels_too(fleet: Any, stream: bool) -> None:
    fleet.worker.permits = 0
    request = asyncio.create_task(fleet.post("/v1/completions", BODY | {"stream": stream}))
    await fleet.until(lambda: fleet.worker.running)
    request.cancel()
    await fleet.until(lambda: fleet.worker.cancels == [1])


async def test_a_workers_death_in_mid_stream_is_an_error_event_and_no_done(fleet: Any) -> None:
    fleet.worker.permits = 3
    async with fleet.http.post("/v1/completions", json=BODY | {"stream": True}) as response:
        assert response.status == 200
        await response.content.readuntil(b"\n\n")
        await fleet.worker.kill()
        rest = (await response.text()).strip().split("\n\n")
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "worker_lost"
    assert "[DONE]" not in "".join(rest)


async def test_the_openai_client_raises_on_an_error_in_mid_stream(fleet: Any) -> None:
    fleet.worker.permits = 3
    stream = await fleet.openai.completions.create(**BODY, stream=True)
    with pytest.raises(openai.APIError, match="lost"):
        async for _ in stream:
            await fleet.worker.kill()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_workers_death_before_the_first_token_is_503(fleet: Any, stream: bool) -> None:
    fleet.worker.permits = 0
    request = asyncio.create_task(fleet.post("/v1/completions", BODY | {"stream": stream}))
    await fleet.until(lambda: fleet.worker.running)
    await fleet.worker.kill()
    status, answer = await request
    assert (status, answer["error"]["code"]) == (503, "worker_lost")


async def test_a_worker_that_comes_back_is_used_again(fleet: Any) -> None:
    port = int(fleet.worker.address.rpartition(":")[2])
    await fleet.worker.kill()
    await fleet.until(lambda: fleet.state.not_ready_reason == "no worker is ready")
    status, answer = await fleet.post("/v1/completions", BODY)
    assert (status, answer["error"]["code"]) == (503, "no_worker")
    assert (await fleet.get("/ready"))[0] == 503
    await fleet.worker.start(port)
    await fleet.ready()
    assert (await fleet.post("/v1/completions", BODY))[0] == 200
    assert fleet.worker.tokens == ["Bearer fleet-token"] * len(fleet.worker.tokens)
    assert {(hello.worker_id, hello.generation) for hello in fleet.worker.hellos} == {("worker-a", 1)}


async def test_a_silent_worker_is_left_and_its_requests_fail(fleet: Any) -> None:
    fleet.worker.permits = 0
    request = asyncio.create_task(fleet.post("/v1/completions", BODY))
    await fleet.until(lambda: fleet.worker.running)
    fleet.worker.heartbeats = False
    status, answer = await request
    assert (status, answer["error"]["code"]) == (503, "worker_lost")
    assert "silent" in answer["error"]["message"]


async def test_another_worker_takes_requests_sent_after_a_death(new_fleet: Any) -> None:
    fleet = await new_fleet(num_workers=2)
    await fleet.until(lambda: all(worker.hellos for worker in fleet.workers))
    await fleet.workers[0].kill()
    await fleet.until(lambda: not fleet.state._pool.views()[0].ready)
    for _ in range(4):
        assert (await fleet.post("/v1/completions", BODY))[0] == 200
    assert len(fleet.workers[1].generates) == 4


async def test_the_other_worker_resumes_a_dead_workers_requests(new_fleet: Any) -> None:
    fleet = await new_fleet(num_workers=2)
    await fleet.until(lambda: all(view.ready for view in fleet.state._pool.views()))
    for worker in fleet.workers:
        worker.permits = 0
    requests = [asyncio.create_task(fleet.post("/v1/completions", BODY)) for _ in range(8)]
    await fleet.until(lambda: sum(len(worker.running) for worker in fleet.workers) == 8)
    counts = [len(worker.running) for worker in fleet.workers]
    assert counts == [4, 4]
    await fleet.workers[0].kill()
    fleet.workers[1].permits = None
    answers = await asyncio.gather(*requests)
    assert [status for status, _ in answers] == [200] * 8
    assert len({answer["choices"][0]["text"] for _, answer in answers}) == 1
    assert len(fleet.workers[1].generates) == 8


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
async def test_a_stream_that_outlives_its_worker_shows_no_interruption(new_fleet: Any, num_tokens: int) -> None:
    """Text, log-probabilities and usage of several choices are those of a stream without the fault."""
    body = BODY | {"n": 2, "logprobs": 3, "stop": ["held back"], "stream": True}
    body["stream_options"] = {"include_usage": True}
    fleet = await new_fleet(num_workers=2)
    await fleet.until(lambda: all(view.ready for view in fleet.state._pool.views()))

    async def read(on_tokens: Any) -> tuple[dict[int, str], dict[int, list[float]], Any]:
        texts, logprobs, usage = {0: "", 1: ""}, {0: list[float](), 1: list[float]()}, None
        async for chunk in await fleet.openai.completions.create(**body):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                logprobs[choice.index] += choice.logprobs.token_logprobs if choice.logprobs else []
            await on_tokens()
        return texts, logprobs, usage

    async def go_on() -> None:
        pass

    expected = await read(go_on)
    for worker in fleet.workers:
        worker.permits = 0
        worker.generates.clear()
    reader = asyncio.create_task(read(go_on))
    await fleet.until(lambda: sum(len(worker.running) for worker in fleet.workers) == 2)
    victim, other = fleet.workers if fleet.workers[0].running else fleet.workers[::-1]
    victim.permits = num_tokens  # both run, and get a token in each step
    await fleet.until(lambda: victim.permits == 0)
    sent = [running.num_output for running in victim.running]
    assert sent == [num_tokens, num_tokens]
    streams = [stream for session in fleet.state._pool.sessions for stream in session._streams.values()]
    await fleet.until(lambda: [len(stream.received) for stream in streams] == sent)
    await victim.kill()
    other.permits = None
    assert await reader == expected
    first = {generate.sampling.choice: generate for generate in victim.generates}
    for generate in other.generates:
        before = first[generate.sampling.choice]
        assert generate.sampling == before.sampling and generate.prompt_token_ids == before.prompt_token_ids
        assert len(generate.output_token_ids) == num_tokens
    resumed = 'lorafleet_choices_resumed_total{model="tiny"} 2.0'
    assert resumed in (await fleet.get("/metrics"))[1]


async def test_a_request_that_outlives_too_many_workers_ends(fleet: Any) -> None:
    port = int(fleet.worker.address.rpartition(":")[2])
    fleet.worker.permits = 0
    request = asyncio.create_task(fleet.post("/v1/completions", BODY))
    for life in range(1, MAX_LOST + 2):
        await fleet.until(lambda life=life: len(fleet.worker.generates) == life and fleet.worker.running)
        await fleet.worker.kill()
        await fleet.worker.start(port)
    status, answer = await request
    assert (status, answer["error"]["code"]) == (503, "worker_lost")
    assert len(fleet.worker.generates) == MAX_LOST + 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_waits_for_a_worker(new_fleet: Any, stream: bool) -> None:
    fleet = await new_fleet(worker_wait_s=60.0)
    port = int(fleet.worker.address.rpartition(":")[2])
    expected = await fleet.openai.completions.create(**BODY, n=2)
    fleet.worker.generates.clear()
    await fleet.worker.kill()
    await fleet.until(lambda: fleet.state.not_ready_reason == "no worker is ready")
    async with asyncio.TaskGroup() as group:
        answer = group.create_task(fleet.openai.completions.create(**BODY, n=2, stream=stream))
        await fleet.until(lambda: len(fleet.state._pool.line) == 1)
        await fleet.worker.start(port)
    if stream:
        texts = {0: "", 1: ""}
        async for chunk in answer.result():
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        assert texts == {choice.index: choice.text for choice in expected.choices}
    else:
        assert answer.result().choices == expected.choices
    assert len(fleet.worker.generates) == 2
    assert 'lorafleet_choices_resumed_total{model="tiny"} 0.0' in (await fleet.get("/metrics"))[1]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_waited_in_vain_gets_503(new_fleet: Any, stream: bool) -> None:
    fleet = await new_fleet(worker_wait_s=0.2)
    await fleet.worker.kill()
    await fleet.until(lambda: fleet.state.not_ready_reason == "no worker is ready")
    began = asyncio.get_running_loop().time()
    async with fleet.http.post("/v1/completions", json=BODY | {"stream": stream}) as response:
        assert response.status == 503
        assert response.headers["Retry-After"]
        assert (await response.json())["error"]["code"] == "no_worker"
    assert asyncio.get_running_loop().time() - began >= 0.2
    assert fleet.state.intake.num_in_flight == 0


def lack(fleet: Any, number: int, digest: str, reason: str) -> None:
    """Publish a table in which a worker lacks an adapter."""
    fleet.controller.table.workers[number].lacking.add(name="x", digest=digest, reason=reason)


async def test_requests_go_where_their_adapter_is(new_fleet: Any) -> None:
    fleet = await new_fleet(num_workers=2)
    lack(fleet, 0, "d-sql", "missing_directory")
    lack(fleet, 1, "d-pirate", "")
    fleet.controller.publish()
    await fleet.until(lambda: fleet.state.table.version > 1)
    for model in ("sql-adapter", "org/pirate") * 4:
        assert (await fleet.post("/v1/completions", {"model": model, "prompt": "hello", "max_tokens": 1}))[0] == 200
    assert {generate.adapter_digest for generate in fleet.workers[0].generates} == {"d-pirate"}
    assert {generate.adapter_digest for generate in fleet.workers[1].generates} == {"d-sql"}


async def test_an_adapter_that_no_worker_can_have_again_is_a_named_503_and_hurts_no_other(new_fleet: Any) -> None:
    fleet = await new_fleet(num_workers=2, worker_wait_s=60.0)
    for number in range(2):
        lack(fleet, number, "d-sql", "changed")
    fleet.controller.publish()
    await fleet.until(lambda: fleet.state.table.version > 1)
    body = {"model": "sql-adapter", "prompt": "hello", "max_tokens": 1}
    status, answer = await fleet.post("/v1/completions", body)
    assert (status, answer["error"]["code"]) == (503, "adapter_unavailable")
    assert "changed" in answer["error"]["message"]
    assert (await fleet.post("/v1/completions", body | {"model": "tiny"}))[0] == 200


async def test_a_request_waits_for_an_adapter_that_is_being_loaded_again(new_fleet: Any) -> None:
    fleet = await new_fleet(worker_wait_s=60.0)
    lack(fleet, 0, "d-sql", "")
    fleet.controller.publish()
    await fleet.until(lambda: fleet.state.table.version > 1)
    body = {"model": "sql-adapter", "prompt": "hello", "max_tokens": 1}
    asking = asyncio.ensure_future(fleet.post("/v1/completions", body))
    await asyncio.sleep(0.2)
    assert not asking.done()
    fleet.controller.table.workers[0].ClearField("lacking")
    fleet.controller.publish()
    assert (await asking)[0] == 200


async def test_a_stream_whose_worker_died_waits_for_another_one_with_its_adapter(new_fleet: Any) -> None:
    fleet = await new_fleet(num_workers=2, worker_wait_s=60.0)
    lack(fleet, 1, "d-sql", "missing_directory")
    fleet.controller.publish()
    await fleet.until(lambda: fleet.state.table.version > 1)
    fleet.workers[0].permits = 2
    body = {"model": "sql-adapter", "prompt": "hello", "max_tokens": 4, "ignore_eos": True}
    asking = asyncio.ensure_future(fleet.post("/v1/completions", body))
    await fleet.until(lambda: fleet.workers[0].permits == 0)
    await fleet.workers[0].kill()
    await fleet.until(lambda: not fleet.workers[0].sessions)
    fleet.controller.table.workers[1].ClearField("lacking")
    fleet.controller.publish()
    status, answer = await asking
    assert (status, answer["usage"]["completion_tokens"]) == (200, 4)


async def test_a_retired_version_is_looked_for_where_it_still_is(
    new_fleet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second worker has restarted; the third one resumes the streams of the first, which dies."""
    monkeypatch.setattr(pool_module, "_SURE_S", 0.0)
    fleet = await new_fleet(num_workers=3)
    for number in (0, 2):
        fleet.workers[number].device_adapters.append("d-sql")
    await fleet.until(lambda: sum(view.tier("d-sql") > 0 for view in fleet.state._pool.views()) == 2)
    for _ in range(12):
        body = {"model": "sql-adapter", "prompt": "hello", "max_tokens": 1}
        assert (await fleet.post("/v1/completions", body))[0] == 200
    assert not fleet.workers[1].generates


async def test_a_controller_that_starts_again_is_told_what_the_last_table_said(fleet: Any) -> None:
    fleet.controller.table.fleet = "fleet-1"
    fleet.controller.table.unloaded.add(name="gone", version=9, unloaded=True)
    fleet.controller.publish()
    await fleet.until(lambda: fleet.state.table.version > 1)
    port = int(fleet.controller.address.rpartition(":")[2])
    await fleet.controller.kill()
    await fleet.controller.start(port)
    await fleet.until(lambda: fleet.controller.num_watches > 1)
    told = fleet.controller.watches[-1]
    assert told.fleet == "fleet-1"
    assert {(known.name, known.unloaded) for known in told.adapters} == {
        ("sql-adapter", False),
        ("org/pirate", False),
        ("gone", True),
    }


async def test_an_adapter_that_no_worker_has_a_slot_for_is_refused_at_once(new_fleet: Any) -> None:
    fleet = await new_fleet(worker_wait_s=60.0)
    fleet.controller.table.workers[0].max_loras = 0
    fleet.controller.publish()
    await fleet.until(lambda: fleet.state._pool.views()[0].max_loras == 0)
    status, answer = await fleet.post("/v1/completions", BODY | {"model": "sql-adapter"})
    assert (status, answer["error"]["param"]) == (400, "model")
    assert "--enable-lora" in answer["error"]["message"]


async def test_a_client_that_leaves_while_no_worker_is_there_leaves_nothing(new_fleet: Any) -> None:
    fleet = await new_fleet(worker_wait_s=60.0)
    fleet.worker.permits = 0
    request = asyncio.create_task(fleet.post("/v1/completions", BODY))
    await fleet.until(lambda: fleet.worker.running)
    port = int(fleet.worker.address.rpartition(":")[2])
    await fleet.worker.kill()
    await fleet.until(lambda: any("placing" in task.get_name() for task in asyncio.all_tasks()))
    request.cancel()
    await fleet.until(lambda: not any("placing" in task.get_name() for task in asyncio.all_tasks()))
    await fleet.worker.start(port)
    await fleet.ready()
    assert len(fleet.worker.generates) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_what_a_worker_refuses_keeps_its_status(fleet: Any, stream: bool) -> None:
    for code, reason, wanted in (
        ("queue_full", "", 429),
        ("adapter_refused", "rank_too_large", 422),
        ("adapter_unavailable", "", 503),
        ("non_finite_logits", "", 500),
    ):
        fleet.worker.error = worker_pb2.Ended(error_code=code, error_message=f"It is {code}.", error_reason=reason)
        async with fleet.http.post("/v1/completions", json=BODY | {"stream": stream}) as response:
            assert response.status == wanted
            error = (await response.json())["error"]
            assert ("Retry-After" in response.headers) == (wanted in (429, 503))
            assert response.headers.get("x-should-retry") == ("false" if wanted == 500 else None)
        assert (error["code"], error["message"]) == (code, f"It is {code}.")
        assert error.get("reason", "") == reason


async def test_one_choices_error_ends_the_request_and_cancels_the_others(fleet: Any) -> None:
    fleet.worker.permits = 0
    request = asyncio.create_task(fleet.post("/v1/completions", BODY | {"n": 3}))
    await fleet.until(lambda: len(fleet.worker.running) == 3)
    session = next(iter(fleet.state._pool.sessions))
    session._streams[2].inbox.fail(QueueFullError("full"))
    status, answer = await request
    assert (status, answer["error"]["code"]) == (429, "queue_full")
    await fleet.until(lambda: {1, 3} <= set(fleet.worker.cancels))


async def test_a_stranger_at_the_address_is_refused(new_fleet: Any) -> None:
    fleet = await new_fleet(wait=False)
    await fleet.ready()
    fleet.worker.generation = 2  # restarted: another generation than the table's
    port = int(fleet.worker.address.rpartition(":")[2])
    await fleet.worker.kill()
    await fleet.worker.start(port)
    num_hellos = len(fleet.worker.hellos)
    await fleet.until(lambda: len(fleet.worker.hellos) > num_hellos + 1)
    assert fleet.state.not_ready_reason == "no worker is ready"
    fleet.controller.table.workers[0].generation = 2
    fleet.controller.publish()
    await fleet.ready()
    assert (await fleet.post("/v1/completions", BODY))[0] == 200


async def test_the_gateway_keeps_serving_while_the_controller_is_down(fleet: Any) -> None:
    port = int(fleet.controller.address.rpartition(":")[2])
    await fleet.controller.kill()
    assert (await fleet.post("/v1/completions", BODY))[0] == 200
    num_watches = fleet.controller.num_watches
    await fleet.controller.start(port)
    await fleet.until(lambda: fleet.controller.num_watches > num_watches)
    fleet.controller.table.adapters.add(name="late", digest="d-late", version=1, parent="tiny")
    fleet.controller.publish()
    await fleet.until(lambda: "late" in fleet.state.table.models)


async def test_a_worker_that_leaves_the_table_finishes_its_work(new_fleet: Any) -> None:
    fleet = await new_fleet()
    fleet.worker.permits = 0
    request = asyncio.create_task(fleet.post("/v1/completions", BODY))
    await fleet.until(lambda: fleet.worker.running)
    del fleet.controller.table.workers[:]
    fleet.controller.publish()
    await fleet.until(lambda: fleet.state.not_ready_reason == "no worker is ready")
    fleet.worker.permits = None
    assert (await request)[0] == 200
    await fleet.until(lambda: not list(fleet.state._pool.sessions))


async def test_the_old_tokenizer_serves_until_the_new_one_is_there(fleet: Any, tokenizer_files: Any) -> None:
    fleet.controller.table.base.tokenizer_digest = "tok-2"
    fleet.controller.table.adapters.add(name="late", digest="d-late", version=1, parent="tiny")
    fleet.controller.publish()
    await fleet.until(lambda: "late" in fleet.state.table.models)
    status, _ = await fleet.post("/v1/completions", BODY | {"model": "late"})
    assert status == 200
    assert fleet.state.text.digest == "tok-1"
    fleet.controller.files["tok-2"] = tokenizer_files
    await fleet.until(lambda: fleet.state.text.digest == "tok-2")


async def test_a_table_that_cannot_be_taken_over_does_not_end_the_watch(
    fleet: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(message: Any) -> RoutingTable:
        raise OverflowError("a bug of ours")

    with monkeypatch.context() as broken:
        broken.setattr(RoutingTable, "from_wire", fail)
        fleet.controller.publish()
        await fleet.until(lambda: "a bug of ours" in caplog.text)
    await fleet.until(lambda: fleet.state.table.version == fleet.controller.table.version)


async def test_a_tokenizer_that_cannot_be_built_for_once_is_built_again(
    fleet: Any, tokenizer_files: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> ModelText:
        raise MemoryError("no room")

    with monkeypatch.context() as broken:
        broken.setattr(ModelText, "from_files", fail)
        fleet.controller.files["tok-2"] = tokenizer_files
        fleet.controller.table.base.tokenizer_digest = "tok-2"
        fleet.controller.publish()
        await fleet.until(lambda: "no room" in caplog.text)
    await fleet.until(lambda: fleet.state.text.digest == "tok-2")


async def test_before_the_controller_answers_the_gateway_is_alive_but_not_ready(new_fleet: Any) -> None:
    fleet = await new_fleet(wait=False, controller="127.0.0.1:1")
    assert (await fleet.get("/health"))[0] == 200
    status, text = await fleet.get("/ready")
    assert status == 503
    assert "routing table" in json.loads(text)["reason"]
    status, answer = await fleet.post("/v1/completions", BODY)
    assert (status, answer["error"]["code"]) == (503, "no_worker")


async def test_draining_finishes_running_requests_and_refuses_new_ones(new_fleet: Any) -> None:
    fleet = await new_fleet(drain_timeout_s=20.0)
    fleet.worker.permits = 0
    running = asyncio.create_task(fleet.post("/v1/completions", BODY))
    await fleet.until(lambda: fleet.worker.running)
    drain = asyncio.create_task(fleet.state.drain())
    await fleet.until(lambda: fleet.state.intake.draining)
    assert (await fleet.get("/ready"))[0] == 503
    assert (await fleet.get("/health"))[0] == 200
    async with fleet.http.post("/v1/completions", json=BODY) as response:
        assert response.status == 503
        assert response.headers["Retry-After"] == "5"
        assert (await response.json())["error"]["code"] == "draining"
    assert not drain.done()
    fleet.worker.permits = None
    assert (await running)[0] == 200
    await drain


async def test_a_drain_that_takes_too_long_ends_streams_with_an_error_event(new_fleet: Any) -> None:
    fleet = await new_fleet(drain_timeout_s=0.05)
    fleet.worker.permits = 3
    async with fleet.http.post("/v1/completions", json=BODY | {"stream": True}) as response:
        await response.content.readuntil(b"\n\n")
        await fleet.state.drain()
        rest = (await response.text()).strip().split("\n\n")
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "draining"
    await fleet.until(lambda: fleet.worker.cancels == [1])
