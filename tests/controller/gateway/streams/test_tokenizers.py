"""Adapters with their own tokenizer or template, which is used for their requests and no others."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lorafleet.controller.gateway.streams import tokenizers as tokenizers_module
from lorafleet.controller.gateway.streams.tokenizers import Tokenizers
from lorafleet.workers.errors import WorkerUnavailableError

HI = [{"role": "user", "content": "hello"}]
OWN_TEMPLATE = b"{% for message in messages %}[{{ message['content'] }}]{% endfor %}"


@pytest.fixture
def adapter(fleet: Any, tokenizer_files: dict[str, bytes]) -> str:
    """An adapter whose template is not the model's."""
    fleet.controller.files["tok-own"] = tokenizer_files | {"chat_template.jinja": OWN_TEMPLATE}
    fleet.controller.table.adapters.add(name="own", digest="d-own", version=1, parent="tiny", text_digest="tok-own")
    fleet.controller.publish()
    return "own"


async def test_a_chat_goes_through_the_adapters_template(fleet: Any, adapter: str, tokenizer: Any) -> None:
    await fleet.until(lambda: adapter in fleet.state.table.models)
    await fleet.openai.chat.completions.create(model=adapter, messages=HI, max_tokens=1)
    assert tokenizer.decode(fleet.worker.generates[-1].prompt_token_ids) == "[hello]"
    await fleet.openai.chat.completions.create(model="sql-adapter", messages=HI, max_tokens=1)
    assert tokenizer.decode(fleet.worker.generates[-1].prompt_token_ids, skip_special_tokens=False).startswith("<|im_")
    _, own = await fleet.post("/tokenize", {"model": adapter, "messages": HI})
    assert own["tokens"] == tokenizer.encode("[hello]")


async def test_files_that_cannot_be_fetched_fail_only_the_adapters_requests(fleet: Any) -> None:
    fleet.controller.table.adapters.add(name="lost", digest="d-lost", version=1, parent="tiny", text_digest="tok-lost")
    fleet.controller.publish()
    await fleet.until(lambda: "lost" in fleet.state.table.models)
    status, answer = await fleet.post("/v1/chat/completions", {"model": "lost", "messages": HI})
    assert (status, answer["error"]["code"]) == (503, "no_worker")
    assert (await fleet.openai.chat.completions.create(model="tiny", messages=HI, max_tokens=1)).choices


async def test_each_is_fetched_once_and_the_last_used_are_kept(
    tokenizer_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizers_module, "MAX_TEXTS", 2)
    fetched: list[str] = []

    async def fetch(digest: str) -> Mapping[str, bytes]:
        fetched.append(digest)
        await asyncio.sleep(0)
        return {} if digest == "broken" else tokenizer_files

    with ThreadPoolExecutor(1) as executor:
        texts = Tokenizers(fetch, executor)
        got = await asyncio.gather(*(texts.get("a") for _ in range(5)))
        assert len({id(text) for text in got}) == 1
        for digest in ("b", "a", "c", "a", "b"):
            assert (await texts.get(digest)).digest == digest
        with pytest.raises(WorkerUnavailableError):
            await texts.get("broken")
        assert fetched == ["a", "b", "c", "b", "broken"]
        await texts.close()


async def test_few_are_loaded_at_once_and_the_others_do_not_wait_for_ever(
    tokenizer_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, eventually: Any
) -> None:
    monkeypatch.setattr(tokenizers_module, "MAX_LOADING", 2)
    monkeypatch.setattr(tokenizers_module, "PLACE_S", 0.05)
    may_end = asyncio.Event()
    fetching: list[str] = []

    async def fetch(digest: str) -> Mapping[str, bytes]:
        fetching.append(digest)
        await may_end.wait()
        return tokenizer_files

    with ThreadPoolExecutor(1) as executor:
        texts = Tokenizers(fetch, executor)
        first = [asyncio.create_task(texts.get(digest)) for digest in "ab"]
        await eventually(lambda: len(fetching) == 2)
        with pytest.raises(WorkerUnavailableError):
            await texts.get("c")
        assert fetching == ["a", "b"]
        may_end.set()
        assert [text.digest for text in await asyncio.gather(*first)] == ["a", "b"]
        assert (await texts.get("c")).digest == "c"
        await texts.close()


async def test_the_memory_of_those_kept_is_bounded(
    tokenizer_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []

    async def fetch(digest: str) -> Mapping[str, bytes]:
        fetched.append(digest)
        return tokenizer_files

    size = tokenizers_module._BYTES_PER_FILE_BYTE * sum(map(len, tokenizer_files.values()))
    with ThreadPoolExecutor(1) as executor:
        texts = Tokenizers(fetch, executor)
        for num_kept in (2, 0):  # one is always kept, since it is in use
            monkeypatch.setattr(tokenizers_module, "MAX_BYTES", num_kept * size)
            for digest in ("a", "b", "a", "b"):
                await texts.get(f"{digest}{num_kept}")
        assert fetched == ["a2", "b2", "a0", "b0", "a0", "b0"]
        await texts.close()


async def test_an_adapter_with_only_a_template_has_the_base_models_tokenizer_in_memory(
    fleet: Any, adapter: str
) -> None:
    await fleet.until(lambda: adapter in fleet.state.table.models)
    own = (await fleet.state.served(lambda table: table.models[adapter])).text
    assert own.template is not fleet.state.text.template
    assert own.tokenizer._backend is fleet.state.text.tokenizer._backend
