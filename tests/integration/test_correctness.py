"""The demo model and adapters against transformers + peft, token for token.

Tokens are equal up to a place where the reference's two best logits differ by less than 1e-3: kernels sum in another
order, and there either token is right.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
import torch
from peft import PeftModel
from prompts import JSON_PROMPTS, PIRATE_PROMPTS, PLAIN_PROMPTS, SQL_PROMPTS
from serving import ADAPTERS, REPOSITORY, Server
from tiny import run_engine
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.scheduling.request import GenerateRequest
from lorafleet.workers.scheduling.sampling_options import SamplingOptions

PROMPTS = SQL_PROMPTS[:2] + PIRATE_PROMPTS[:2] + JSON_PROMPTS[:2] + PLAIN_PROMPTS[:2]
NUM_TOKENS = 20
TIE = 1e-3
MODELS = (None, *ADAPTERS)


@dataclass(frozen=True)
class Expected:
    """The reference's greedy answer to one prompt."""

    prompt: list[int]
    token_ids: list[int]
    margins: list[float]  # best logit minus second best, at each position
    logprobs: list[float]  # of token_ids, in float32

    def check(self, token_ids: Sequence[int], what: str) -> None:
        for i, (ours, theirs) in enumerate(zip(token_ids, self.token_ids, strict=False)):
            if ours != theirs:
                assert self.margins[i] < TIE, f"{what}: token {i} is {ours}, not {theirs}; margin {self.margins[i]:.4f}"
                return
        assert len(token_ids) == len(self.token_ids), what


@pytest.fixture(scope="module")
def expected(demo_model: Path) -> dict[tuple[str | None, int], Expected]:
    """Return the answers by (adapter, prompt number), computed now by transformers + peft in float32."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    base = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    answers: dict[tuple[str | None, int], Expected] = {}
    for name in MODELS:
        model = base if name is None else PeftModel.from_pretrained(base, REPOSITORY / "examples" / "adapters" / name)
        model.eval()
        for number, prompt in enumerate(PROMPTS):
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
            ids = tokenizer(text, add_special_tokens=False).input_ids
            answers[name, number] = _greedy(model, ids, tokenizer.eos_token_id)
        if isinstance(model, PeftModel):
            base = model.unload()
    return answers


def _greedy(model: torch.nn.Module, prompt: list[int], eos: int) -> Expected:
    with torch.no_grad():
        output = model.generate(  # type: ignore[operator]
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=eos,
            output_logits=True,
            return_dict_in_generate=True,
        )
    token_ids = output.sequences[0, len(prompt) :].tolist()
    logits = torch.stack(output.logits)[:, 0].float()
    best = logits.topk(2, dim=-1).values
    logprobs = logits.log_softmax(dim=-1)
    return Expected(
        prompt, token_ids, (best[:, 0] - best[:, 1]).tolist(), [logprobs[i, t].item() for i, t in enumerate(token_ids)]
    )


def _engine(demo_model: Path, dtype: str, **changes: object) -> tuple[Engine, dict[str | None, str | None]]:
    config = EngineConfig(
        model=str(demo_model), dtype=dtype, kv_cache_memory_bytes=1 << 30, lora=LoRAConfig(max_loras=3)
    )
    engine = Engine.from_config(dataclasses.replace(config, **changes))  # type: ignore[arg-type]
    engine.load()
    digests: dict[str | None, str | None] = {None: None}
    for name in ADAPTERS:
        digests[name] = engine.register_adapter(str(REPOSITORY / "examples" / "adapters" / name)).digest
    return engine, digests


VARIANTS: dict[str, dict[str, object]] = {
    "one mixed batch": {"max_num_seqs": 64, "max_num_batched_tokens": 4096},
    "chunked, two slots": {"max_num_seqs": 8, "max_num_batched_tokens": 24, "lora": LoRAConfig(max_loras=2)},
    "preempted": {"max_num_seqs": 32, "max_model_len": 128, "kv_cache_memory_bytes": 46_080 * 16 * 40},
    "alone": {"max_num_seqs": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_tokens_equal_transformers_and_peft(
    variant: str, demo_model: Path, expected: dict[tuple[str | None, int], Expected]
) -> None:
    engine, digests = _engine(demo_model, "float32", **VARIANTS[variant])
    options = SamplingOptions(max_tokens=NUM_TOKENS, temperature=0.0)
    requests = [
        GenerateRequest(f"{name or ''}:{number}", tuple(answer.prompt), options, digests[name])
        for (name, number), answer in sorted(expected.items(), key=lambda item: item[0][1])
    ]
    if variant == "alone":
        requests = requests[::5]
    try:
        results = run_engine(engine, requests, timeout_s=300)
        engine.check_integrity()
        if variant == "preempted":
            assert engine.stats().num_preemptions > 0, "the variant must preempt to mean anything"
    finally:
        engine.close()
    for request_id, result in results.items():
        name, _, number = request_id.partition(":")
        expected[name or None, int(number)].check(result.token_ids, f"{variant}, {request_id}")


def test_bfloat16_logprobs_lie_close_to_the_reference(
    demo_model: Path, expected: dict[tuple[str | None, int], Expected]
) -> None:
    """The reference's own tokens are the input, so that an early difference does not hide later ones."""
    engine, digests = _engine(demo_model, "bfloat16", max_num_seqs=64)
    options = SamplingOptions(max_tokens=1, temperature=0.0, logprobs=20)
    requests = {}
    for (name, number), answer in expected.items():
        for i in range(0, len(answer.token_ids), 4):
            prompt = tuple(answer.prompt + answer.token_ids[:i])
            requests[f"{name or ''}:{number}:{i}"] = GenerateRequest(
                f"{name or ''}:{number}:{i}", prompt, options, digests[name]
            )
    try:
        results = run_engine(engine, list(requests.values()), timeout_s=300)
    finally:
        engine.close()
    differences = []
    for request_id, result in results.items():
        adapter, prompt_number, position = request_id.split(":")
        answer = expected[adapter or None, int(prompt_number)]
        top = dict(zip(result.logprobs[0].top_ids, result.logprobs[0].top_logprobs, strict=True))
        wanted = answer.token_ids[int(position)]
        assert wanted in top, f"{request_id}: the reference's token is not among our 20 best"
        differences.append(abs(top[wanted] - answer.logprobs[int(position)]))
    # bfloat16 has 8 bits of mantissa; thirty layers of it leave a few hundredths, seldom more.
    assert sum(differences) / len(differences) < 0.05
    assert max(differences) < 0.5


async def test_http_answers_equal_the_reference_alone_mixed_streamed_and_not(
    demo_server: Server, demo_model: Path, expected: dict[tuple[str | None, int], Expected]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)

    async def complete(session: aiohttp.ClientSession, name: str | None, number: int, stream: bool) -> str:
        answer = expected[name, number]
        body = {
            "model": name or "smollm2",
            "prompt": answer.prompt,
            "max_tokens": NUM_TOKENS,
            "temperature": 0,
            "stream": stream,
            "logprobs": 0,
        }
        async with session.post("/v1/completions", json=body) as response:
            assert response.status == 200, await response.text()
            if not stream:
                return str((await response.json())["choices"][0]["text"])
            text = ""
            async for line in response.content:
                if line.startswith(b"data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
            return text

    def check(name: str | None, number: int, text: str) -> None:
        answer = expected[name, number]
        wanted = tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        if min(answer.margins) >= TIE:
            assert text == wanted, (name, number)

    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(demo_server.url, timeout=timeout) as session:
        for name in MODELS:
            check(name, 1, await complete(session, name, 1, stream=False))
        jobs = [(name, number, number % 2 == 0) for number in range(len(PROMPTS)) for name in MODELS]
        texts = await asyncio.gather(*(complete(session, *job) for job in jobs))
    for (name, number, _), text in zip(jobs, texts, strict=True):
        check(name, number, text)
