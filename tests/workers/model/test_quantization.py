"""`--quantization int8`: it computes with the integers that it should, and a real model hardly notices."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import tiny
import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedModel

from lorafleet.kernels.linear import quantize_int8
from lorafleet.workers import LLM, EngineArgs
from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine.batch import Scheduled, StepPlan
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.engine.request import GenerateRequest, Request
from lorafleet.workers.engine.sampling_options import SamplingOptions
from lorafleet.workers.errors import ConfigError
from lorafleet.workers.memory_plan import DeviceMemory, plan_memory
from lorafleet.workers.model import architecture
from lorafleet.workers.model.decoder import Decoder
from lorafleet.workers.model.runner import ModelRunner

NUM_PROMPT, NUM_OUTPUT = 50, 12
# Of log-probabilities, between activations in bfloat16 (ours) and float32 (the reference's): mean and largest.
TOLERANCE = (0.03, 0.2)

TEXT = '''\
The harbour at the mouth of the river had been built in three stages. The oldest part, a curved wall of grey stone, was
finished in 1794 and still keeps the worst of the winter storms away from the fishing boats. A second wall followed when
the railway came, because coal had to be loaded quickly and the old quay was too short for the steamers. The third part
is of concrete; it was poured after the flood of 1953, and nobody in the town thinks that it is beautiful.

Today there are forty boats in summer and about a dozen in winter. Most of them catch crabs and lobsters close to the
shore. "My father went out for herring," says Anna, who repairs nets in a shed behind the ice house, "but the herring
went away before I was born. If you want to earn a living now, you have to sell to the restaurants yourself, and you
have to be back before noon." She has two children, and neither of them wants to go to sea. The elder studies computer
science in the city; the younger would like to become a nurse.

To find out how much the harbour costs, we asked the town council for the numbers of the last five years:

year,income,repairs
2019,41200,38900
2020,30150,12400
2021,35700,52300
2022,44800,40100
2023,47350,61000

In other words, the income covers the repairs in three years out of five. The rest is paid by the county. The clerk adds
the numbers up with a short program, which she showed us:

def balance(rows):
    """Income minus repairs of each year."""
    result = {}
    for year, income, repairs in rows:
        result[year] = income - repairs
    return result

The next question is what to do with the concrete wall. Engineers have measured it twice. It moves by about two
millimetres a year, always in the same direction, and the gap between it and the stone wall is now wide enough for a
hand. There are three proposals. The cheapest is to fill the gap and wait. The second is to drive steel piles into the
sea bed along the outer side, which would take one summer and close the harbour for six weeks. The third is to take the
whole wall down and to use the rubble for a new one, further out, where the water is deeper. "Whatever we choose," says
the mayor, "we must choose it before the next big storm. The sea does not wait for a vote."
'''
MAX_SEQS = 64
# Of the text's next-token log-probabilities, int8 against bfloat16. Measured: 0.07 at every instruction set, of which
# 0.03 is bfloat16's own distance from float32; and a perplexity higher by 0.6 to 0.9 %.
MEAN_DIFFERENCE = 0.14
PERPLEXITY_RATIO = 1.02


def add_outliers(model: PreTrainedModel) -> None:
    """One large weight a row makes 8-bit steps so coarse that rounding shows far above bfloat16's own."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.scatter_(1, torch.randint(0, parameter.shape[1], (parameter.shape[0], 1)), 1.0)


def rounded(model: nn.Module, *, int8: bool) -> nn.Module:
    """The reference, computing in float32: all weights as in bfloat16, and the decoder's linears as from integers."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.bfloat16()
        is_linear = parameter.dim() == 2 and "layers." in name and "lora_" not in name
        if int8 and is_linear:
            integers, scale_O = quantize_int8(parameter.data)
            parameter.data = integers.float() * scale_O[:, None]
        parameter.data = parameter.data.float()
    return model


def differences(result: tiny.Result, prompt: torch.Tensor, reference: nn.Module) -> torch.Tensor:
    """|ours - the reference's| of the 20 best log-probabilities at each output position."""
    with torch.no_grad():
        logits = reference(torch.cat([prompt, torch.tensor(result.token_ids)])[None]).logits[0]
    expected = logits[NUM_PROMPT - 1 :].log_softmax(dim=-1)
    ours = torch.tensor([logprobs.top_logprobs for logprobs in result.logprobs])
    ids = torch.tensor([logprobs.top_ids for logprobs in result.logprobs])
    return (ours - expected[:-1].gather(1, ids)).abs()


@pytest.mark.parametrize("name", ["llama2", "qwen2", "smollm2"])
def test_the_models_linears_are_scaled_integers_and_adapters_lie_on_top(name: str, tmp_path: Path) -> None:
    model = tiny.make_model(name, tmp_path / "model")
    add_outliers(model)
    model.save_pretrained(tmp_path / "model")
    adapted = tiny.make_adapter(copy.deepcopy(model), tmp_path / "adapter")
    prompt = torch.randint(3, model.config.vocab_size, (NUM_PROMPT,))
    greedy = SamplingOptions(max_tokens=NUM_OUTPUT, temperature=0.0, logprobs=20, ignore_eos=True)
    engine = Engine.from_config(
        EngineConfig(
            model=str(tmp_path / "model"),
            quantization="int8",
            max_num_seqs=4,
            max_num_batched_tokens=16,  # the prompt is computed in four chunks
            lora=LoRAConfig(max_loras=2),
        )
    )
    try:
        engine.load()
        digest = engine.register_adapter(str(tmp_path / "adapter")).digest
        requests = [
            GenerateRequest("base", tuple(prompt.tolist()), greedy),
            GenerateRequest("adapter", tuple(prompt.tolist()), greedy, digest),
        ]
        results = tiny.run_engine(engine, requests)
    finally:
        engine.close()
    for result, reference in ((results["base"], model), (results["adapter"], adapted)):
        difference = differences(result, prompt, rounded(copy.deepcopy(reference), int8=True))
        assert difference.mean().item() < TOLERANCE[0] and difference.max().item() < TOLERANCE[1]
        unquantised = differences(result, prompt, rounded(copy.deepcopy(reference), int8=False))
        assert unquantised.mean().item() > 2 * difference.mean().item(), "the integers must make a difference"
    without = differences(results["adapter"], prompt, rounded(model, int8=True))
    assert without.mean().item() > TOLERANCE[0], "the adapter must make a difference"


def make_runner(model_dir: Path, quantization: str | None) -> ModelRunner:
    spec = architecture.read_spec(model_dir)
    config = EngineConfig(model=str(model_dir), quantization=quantization, max_num_seqs=MAX_SEQS)
    memory = DeviceMemory(8 << 30, 8 << 30, 8 << 30, is_cpu=True)
    plan = plan_memory(spec, config, memory, dtype="bfloat16", lora_dtype="bfloat16")
    runner = ModelRunner(spec, plan, max_lora_rank=0, device=torch.device("cpu"))
    runner.load(model_dir)
    return runner


@pytest.mark.parametrize("name", ["llama2", "smollm2"])
def test_embeddings_head_and_norms_stay_in_bfloat16(name: str, tmp_path: Path) -> None:
    model = tiny.make_model(name, tmp_path).bfloat16()
    decoder: Decoder = make_runner(tmp_path, "int8")._decoder
    for layer in decoder._layers:
        for linear in (layer.qkv, layer.o, layer.gate_up, layer.down):
            assert linear.weight.data.dtype == torch.int8
            assert linear.weight.scale_O is not None and linear.weight.scale_O.dtype == torch.float32
        assert all(norm.weight_WH.dtype == torch.bfloat16 for norm in layer.norms())
    for weight in (decoder._embedding.weight, decoder._head.weight):
        assert weight.scale_O is None and weight.data.dtype == torch.bfloat16
    ids = torch.arange(model.config.vocab_size)
    assert torch.equal(decoder._embedding.embed(ids), model.get_input_embeddings()(ids))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_dtype_is_refused_with_both_names(dtype: str, tmp_path: Path) -> None:
    tiny.make_model("smollm2", tmp_path)
    said = f"--quantization int8 computes in bfloat16, but --dtype is {dtype}"
    with pytest.raises(ConfigError, match=said):
        EngineArgs(model=str(tmp_path), quantization="int8", dtype=dtype).to_config()
    with pytest.raises(ConfigError, match=said):
        LLM(model=str(tmp_path), quantization="int8", dtype=dtype)


def next_token_logprobs(model_dir: Path, token_ids: list[int], quantization: str | None) -> torch.Tensor:
    """Of each token of a text but the first, given those before it.

    In each step the next tokens are as many requests, with one token each to compute and their pages in common.
    """
    runner = make_runner(model_dir, quantization)
    logprobs = []
    for start in range(0, len(token_ids) - 1, MAX_SEQS):
        scheduled = []
        for end in range(start + 1, min(start + MAX_SEQS, len(token_ids) - 1) + 1):
            request = Request.from_generate(
                GenerateRequest(str(end), tuple(token_ids[:end]), SamplingOptions(max_tokens=1)), arrival=end
            )
            request.num_computed_tokens = end - 1
            request.pages = list(range(64))
            scheduled.append(Scheduled(request, 1, ()))
        logits = runner.logits(StepPlan(tuple(scheduled), ()))
        targets = torch.tensor(token_ids[start + 1 : start + 1 + len(scheduled)])
        logprobs.append(logits.float().log_softmax(dim=-1).gather(1, targets[:, None]).flatten())
    return torch.cat(logprobs)


def test_a_real_models_log_probabilities_hardly_change(demo_model: Path) -> None:
    token_ids = Tokenizer.from_file(str(demo_model / "tokenizer.json")).encode(TEXT).ids
    plain = next_token_logprobs(demo_model, token_ids, None)
    int8 = next_token_logprobs(demo_model, token_ids, "int8")
    assert 0.0 < (int8 - plain).abs().mean().item() < MEAN_DIFFERENCE
    assert 1 / PERPLEXITY_RATIO < math.exp((plain - int8).mean()) < PERPLEXITY_RATIO
