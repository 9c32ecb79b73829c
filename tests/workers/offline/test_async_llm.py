"""The asyncio engine when something is slow, fails or is over: no request waits for another's problem, or forever."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import pytest
import tiny

from lorafleet.workers import AsyncLLM, EngineArgs, LoRARequest, SamplingParams, StructuredOutputsParams
from lorafleet.workers.adapters.folder import AdapterFolder
from lorafleet.workers.engine import registered
from lorafleet.workers.errors import DrainingError, InternalError, InvalidRequestError, LoRAFleetError
from lorafleet.workers.sources.adapters import resolve_adapter

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("async")
    model = tiny.make_model("smollm2", root / "model")
    tiny.save_tokenizer(root / "model")
    for seed, name in enumerate("ab"):
        tiny.make_adapter(copy.deepcopy(model), root / name, seed=seed + 1)
    return root


@pytest.fixture
async def llm(root: Path) -> AsyncIterator[AsyncLLM]:
    args = EngineArgs(model=str(root / "model"), dtype="float32", enable_lora=True, kv_cache_memory_bytes=4_000_000)
    llm = await AsyncLLM.from_engine_args(args)
    yield llm
    await llm.close()


@pytest.fixture
def slow_b(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Adapter b is not found before this is set."""
    may_go_on = threading.Event()

    def slow(path: str, roots: Sequence[str] | None = None) -> AdapterFolder:
        if path.endswith("/b"):
            assert may_go_on.wait(TIMEOUT_S)
        return resolve_adapter(path, roots)

    monkeypatch.setattr(registered, "resolve_adapter", slow)
    yield may_go_on
    may_go_on.set()


async def last(llm: AsyncLLM, request_id: str, lora: LoRARequest | None = None) -> list[int]:
    async with asyncio.timeout(TIMEOUT_S):
        outputs = [output async for output in llm.generate([5, 6, 7], GREEDY, request_id, lora)]
    return outputs[-1].outputs[0].token_ids


async def test_a_slow_adapter_holds_up_none_that_is_loaded(llm: AsyncLLM, root: Path, slow_b: threading.Event) -> None:
    a, b = LoRARequest("a", 1, str(root / "a")), LoRARequest("b", 2, str(root / "b"))
    before = await last(llm, "1", a)
    adding = asyncio.ensure_future(llm.add_lora(b))
    generating = asyncio.ensure_future(last(llm, "2", b))
    assert await last(llm, "3", a) == before
    assert await llm.add_lora(a) and await llm.pin_lora(1) and await llm.remove_lora(1)
    assert not adding.done() and not generating.done()
    slow_b.set()
    assert await adding and await generating
    assert await llm.list_loras() == {2}


async def test_after_a_crash_whoever_waits_and_whoever_comes_is_told(
    llm: AsyncLLM, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = LoRARequest("a", 1, str(root / "a"))
    await last(llm, "1", a)

    def fail(plan: object) -> None:
        raise RuntimeError("a kernel failed")

    with monkeypatch.context() as patched:
        patched.setattr(llm.engine._runner, "forward", fail)
        generating = asyncio.ensure_future(last(llm, "2", a))
        with pytest.raises(InternalError):
            await generating
    for call in (last(llm, "3", a), last(llm, "4"), llm.add_lora(a), llm.remove_lora(1)):
        with pytest.raises(InternalError):
            await asyncio.wait_for(call, TIMEOUT_S)


async def test_closing_ends_everything_that_is_awaited(root: Path, slow_b: threading.Event) -> None:
    args = EngineArgs(model=str(root / "model"), dtype="float32", enable_lora=True, kv_cache_memory_bytes=4_000_000)
    llm = await AsyncLLM.from_engine_args(args)
    a, b = LoRARequest("a", 1, str(root / "a")), LoRARequest("b", 2, str(root / "b"))
    long = llm.generate("the", SamplingParams(max_tokens=200, ignore_eos=True), "long", a)
    await anext(long)
    waiting = [
        asyncio.ensure_future(anext(long)),
        asyncio.ensure_future(llm.remove_lora(1)),
        asyncio.ensure_future(llm.add_lora(b)),
        asyncio.ensure_future(last(llm, "b", b)),
    ]
    while await llm.list_loras():  # noqa: ASYNC110 (the removal has begun, and waits for the request)
        await asyncio.sleep(0.001)
    await asyncio.wait_for(llm.close(), TIMEOUT_S)
    ended = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), TIMEOUT_S)
    assert all(isinstance(outcome, LoRAFleetError) for outcome in ended[1:]), ended
    for call in (last(llm, "late"), last(llm, "late a", a), llm.add_lora(a), llm.remove_lora(1)):
        with pytest.raises(DrainingError, match="closed"):
            await asyncio.wait_for(call, TIMEOUT_S)
    await llm.close()


async def test_any_number_of_requests_may_be_awaited(llm: AsyncLLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)

    async def one(number: int) -> int:
        outputs = [output async for output in llm.generate([5, 6], params, f"{number}")]
        return len(outputs[-1].outputs[0].token_ids)

    assert sum(await asyncio.gather(*map(one, range(4500)))) == 4500


async def test_structured_outputs_are_checked_beside_other_requests(llm: AsyncLLM, root: Path) -> None:
    async def generate(request_id: str, **fields: str) -> str:
        params = SamplingParams(max_tokens=20, structured_outputs=StructuredOutputsParams(**fields))  # type: ignore[arg-type]
        adapter = LoRARequest("a", 1, str(root / "a"))
        outputs = [output async for output in llm.generate([5, 6, 7], params, request_id, adapter)]
        return outputs[-1].outputs[0].text

    plain, word, refused = await asyncio.gather(
        last(llm, "plain"), generate("word", regex="[ab]{4}"), generate("bad", regex="(a"), return_exceptions=True
    )
    assert isinstance(word, str) and len(word) == 4 and set(word) <= set("ab")
    assert isinstance(refused, InvalidRequestError)
    assert plain == await last(llm, "again")
