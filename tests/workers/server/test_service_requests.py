"""Requests over the worker's sessions: each gets its own tokens and ends exactly once."""

from __future__ import annotations

import random
from typing import Any

import pytest
from fake_worker import Worker, eventually, expected_tokens

from lorafleet.proto import worker_pb2


async def test_requests_of_one_session_run_together_and_each_gets_its_own_tokens(worker: Worker) -> None:
    async with worker.session() as client:
        for stream in range(1, 6):
            await client.generate(stream, [stream, 10], max_tokens=stream)
        for stream in range(1, 6):
            assert (await client.ending(stream)).finish == worker_pb2.FINISH_LENGTH
            assert client.tokens[stream] == expected_tokens([stream, 10], stream)
    assert worker.service.num_unfinished == 0


async def test_whose_a_request_is_and_what_it_weighs_reach_the_engine(worker: Worker) -> None:
    worker.engine.paused = True
    async with worker.session() as client:
        await client.generate(1, [1], tenant="acme", tenant_weight=2.5, adapter_weight=0.5, priority=-3)
        await client.generate(2, [1])
        await eventually(lambda: worker.engine.num_running == 2)
        one, other = (request for request, _ in worker.engine._running.values())
        assert (one.tenant, one.tenant_weight, one.adapter_weight, one.priority) == ("acme", 2.5, 0.5, -3)
        assert (other.tenant, other.tenant_weight, other.adapter_weight, other.priority) == ("", 1.0, 1.0, 0)
        for stream, (name, weight) in enumerate(
            [("tenant_weight", 1e9), ("tenant_weight", 0.0), ("adapter_weight", 0.0)], start=3
        ):
            fields: dict[str, Any] = {name: weight}
            await client.generate(stream, [1], **fields)
            ended = (await client.ending(stream)).ended
            assert ended is not None and ended.error_code == "invalid_request"
            assert name in ended.error_message
        worker.engine.resume()
        await client.ending(1)
        await client.ending(2)


async def test_a_composition_reaches_the_engine_and_one_that_cannot_be_is_refused(worker: Worker) -> None:
    worker.engine.paused = True
    parts = [worker_pb2.ComposedAdapter(digest="b", weight=0.7), worker_pb2.ComposedAdapter(digest="a", weight=-2)]
    async with worker.session() as client:
        await client.generate(1, [1], composition=parts)
        await eventually(lambda: worker.engine.num_running == 1)
        ((request, _),) = worker.engine._running.values()
        assert (request.adapter, request.composition) == (None, (("a", -2.0), ("b", 0.7)))
        await client.generate(2, [1], composition=parts, adapter_digest="a")
        await client.generate(3, [1], composition=[worker_pb2.ComposedAdapter(digest="a", weight=float("nan"))])
        for stream, said in ((2, "named once"), (3, "nan")):
            ended = (await client.ending(stream)).ended
            assert ended is not None and ended.error_code == "invalid_request"
            assert said in ended.error_message
        worker.engine.resume()
        await client.ending(1)


async def test_how_much_of_a_prompt_was_found_comes_with_its_first_token(worker: Worker) -> None:
    async with worker.session() as client:
        await client.generate(1, [1], max_tokens=2)
        await client.ending(1)
        assert not client.cached
        worker.engine.num_cached_tokens = 48
        await client.generate(2, [1], max_tokens=3, cache_salt="s")
        await client.ending(2)
        assert client.cached == [(2, 48)]
        assert worker.engine.last_salt == "s"


async def test_sessions_do_not_see_each_others_streams(worker: Worker) -> None:
    async with worker.session() as one, worker.session() as other:
        await one.generate(1, [100])
        await other.generate(1, [200])
        await one.ending(1)
        await other.ending(1)
        assert one.tokens[1] == expected_tokens([100], 4)
        assert other.tokens[1] == expected_tokens([200], 4)


async def test_a_step_is_one_message_with_a_row_for_each_request(worker: Worker) -> None:
    worker.engine.paused = True
    async with worker.session() as client:
        for stream in (1, 2, 3):
            await client.generate(stream, [stream], max_tokens=1)
        await eventually(lambda: worker.engine.num_running == 3)
        worker.engine.resume()
        while (message := await client.read()).WhichOneof("message") != "step":
            pass
        assert sorted(message.step.stream) == [1, 2, 3]
        assert message.step.step == 1


async def test_logprobs_name_their_row(worker: Worker) -> None:
    async with worker.session() as client:
        await client.generate(1, [5], max_tokens=1, sampling={"logprobs": 2})
        await client.ending(1)
        (logprobs,) = client.logprobs
        assert (logprobs.row, logprobs.rank, list(logprobs.top_ids)) == (0, 1, [5, 5])
        assert list(logprobs.top_logprobs) == [-0.5, -0.5]


async def test_a_prompts_logprobs_come_before_its_first_token_and_a_request_may_want_no_token(worker: Worker) -> None:
    async with worker.session() as client:
        await client.generate(1, [5, 6, 7], max_tokens=1, sampling={"prompt_logprobs": 2})
        await client.ending(1)
        (part,) = client.prompt_logprobs
        assert (part.stream, part.num_top, list(part.ranks), list(part.top_ids)) == (1, 2, [1, 1], [7] * 4)
        assert (list(part.logprobs), list(part.top_logprobs)) == ([-0.25] * 2, [-0.125] * 4)
        assert client.tokens[1] == expected_tokens([5, 6, 7], 1)
        await client.generate(2, [5, 6], max_tokens=0, sampling={"prompt_logprobs": 0})
        ended = (await client.ending(2)).ended
        assert ended is not None and ended.finish == worker_pb2.FINISH_LENGTH
        assert not client.tokens[2] and client.prompt_logprobs[-1].stream == 2
    assert worker.service.num_unfinished == 0


async def test_a_cancelled_request_ends_as_cancelled_and_only_once(worker: Worker) -> None:
    worker.engine.paused = True
    async with worker.session() as client:
        await client.generate(1, [1])
        await client.generate(2, [2])
        for _ in range(3):
            await client.send(cancel=worker_pb2.Cancel(stream=1))
        await client.send(cancel=worker_pb2.Cancel(stream=99))
        ended = (await client.ending(1)).ended
        assert ended is not None and ended.cancelled and not ended.error_code
        worker.engine.resume()
        await client.ending(2)
        await client.send(cancel=worker_pb2.Cancel(stream=2))
        await client.generate(3, [3])
        await client.ending(3)
        assert {stream: len(endings) for stream, endings in client.endings.items()} == {1: 1, 2: 1, 3: 1}


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        pytest.param({"prompt": []}, "invalid_request", id="empty prompt"),
        pytest.param({"prompt": [1], "max_tokens": 2**31}, "invalid_request", id="max_tokens"),
        pytest.param({"prompt": [1], "sampling": {"temperature": -1.0}}, "invalid_request", id="temperature"),
        pytest.param({"prompt": [1], "sampling": {"min_p": float("nan")}}, "invalid_request", id="not a number"),
        pytest.param({"prompt": [1], "sampling": {"logprobs": 4096}}, "invalid_request", id="logprobs"),
        pytest.param({"prompt": [1], "adapter_digest": "unknown"}, "model_not_found", id="adapter"),
    ],
)
async def test_a_bad_request_ends_with_its_error_and_the_session_goes_on(
    worker: Worker, fields: dict[str, Any], code: str
) -> None:
    async with worker.session() as client:
        await client.generate(1, **fields)
        ended = (await client.ending(1)).ended
        assert ended is not None and ended.error_code == code and ended.error_message
        await client.generate(2, [7])
        await client.ending(2)
        assert client.tokens[2] == expected_tokens([7], 4)


async def test_a_bug_of_ours_in_one_request_ends_no_other(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(request: object, **options: object) -> None:
        raise ZeroDivisionError

    worker.engine.paused = True
    async with worker.session() as client:
        await client.generate(1, [1])
        await eventually(lambda: worker.engine.num_running == 1)
        with monkeypatch.context() as broken:
            broken.setattr(worker.engine, "submit", fail)
            await client.generate(2, [1])
            ended = (await client.ending(2)).ended
        assert ended is not None and ended.error_code == "internal_error"
        worker.engine.resume()
        assert (await client.ending(1)).finish == worker_pb2.FINISH_LENGTH
    assert worker.service.num_unfinished == 0


async def test_a_request_without_sampling_is_refused(worker: Worker) -> None:
    async with worker.session() as client:
        await client.send(generate=worker_pb2.Generate(stream=1, prompt_token_ids=[1]))
        ended = (await client.ending(1)).ended
        assert ended is not None and ended.error_code == "invalid_request"


async def test_a_stream_number_is_not_used_twice(worker: Worker) -> None:
    async with worker.session() as client:
        await client.generate(1, [1])
        await client.ending(1)
        await client.generate(1, [2])
        await client.read_until(lambda: len(client.endings[1]) == 2)
        ended = client.endings[1][1].ended
        assert ended is not None and ended.error_code == "invalid_request"


async def test_a_full_queue_is_said_so(worker: Worker) -> None:
    worker.engine.paused = True
    worker.engine.num_slots = 1
    async with worker.session() as client:
        await client.generate(1, [1])
        await client.generate(2, [2])
        ended = (await client.ending(2)).ended
        assert ended is not None and ended.error_code == "queue_full"


@pytest.mark.parametrize("seed", range(5))
async def test_every_request_ends_exactly_once_whatever_is_done(worker: Worker, seed: int) -> None:
    """Random submissions, cancels, pauses and bad requests on two sessions."""
    draw = random.Random(seed)
    worker.engine.num_slots = 12
    async with worker.session() as one, worker.session() as other:
        sent: dict[int, list[int]] = {0: [], 1: []}
        clients = (one, other)
        for _ in range(200):
            which = draw.randrange(2)
            client, streams = clients[which], sent[which]
            action = draw.random()
            if action < 0.6:
                streams.append(len(streams) + 1)
                prompt = [] if draw.random() < 0.1 else [draw.randrange(1000)]
                await client.generate(streams[-1], prompt, max_tokens=draw.randrange(0, 30))
            elif action < 0.9 and streams:
                await client.send(cancel=worker_pb2.Cancel(stream=draw.choice(streams)))
            elif action < 0.95:
                worker.engine.paused = True
            else:
                worker.engine.resume()
        worker.engine.resume()
        for client, streams in zip(clients, sent.values(), strict=True):
            for stream in streams:
                await client.ending(stream)
            await client.read_until(lambda client=client: len(client.heartbeats) > 1)  # type: ignore[misc]
            assert {len(client.endings[stream]) for stream in streams} == {1}
        assert worker.service.num_unfinished == worker.engine.num_running == 0
