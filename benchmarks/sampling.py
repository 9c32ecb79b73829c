"""Measures the sampling of a decode step, by what its rows ask for.

    python -m benchmarks.sampling [--rows N] [--vocab-size V] [--num-threads N]

Rows draw with temperature 1. Each has a prompt and an output of 200 tokens, and gets one more in every step.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from typing import Any

import torch

from lorafleet.kernels import native
from lorafleet.workers.model.rules.option_rules import option_rules
from lorafleet.workers.model.sampling import Sampler
from lorafleet.workers.scheduling.request import GenerateRequest, Request
from lorafleet.workers.scheduling.sampling_options import SamplingOptions

_NUM_TOKENS = 200  # of the prompt, and of the output
_NUM_STEPS = 60


def options(vocab_size: int) -> dict[str, dict[str, Any]]:
    """Return what rows ask for, by name."""
    rng = random.Random(0)
    ids = rng.sample(range(vocab_size), 1500)
    penalties = {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.3}
    bias = {"logit_bias": tuple((token, rng.uniform(-5, 5)) for token in ids[:300])}
    words = {"bad_words": tuple((ids[i],) if i % 2 else (ids[i], ids[i + 1]) for i in range(300, 400))}
    allowed = {"allowed_token_ids": frozenset(ids)}
    return {
        "nothing": {},
        "penalties": penalties,
        "logit_bias of 300 tokens": bias,
        "allowed_token_ids": allowed,
        "100 bad_words": words,
        "min_tokens": {"min_tokens": 10**6, "stop_token_ids": frozenset(ids[:2])},
        "all of these": penalties | bias | words | allowed,
    }


def step_ms(num_rows: int, vocab_size: int, asked: dict[str, Any]) -> float:
    """Return the median time of a step's sampling."""
    rng, cpu = random.Random(1), torch.device("cpu")
    requests = []
    for seed in range(num_rows):
        prompt, output = ([rng.randrange(vocab_size) for _ in range(_NUM_TOKENS)] for _ in range(2))
        sampling = SamplingOptions(max_tokens=2 * 10**6, seed=seed, **asked)
        requests.append(Request.from_generate(GenerateRequest("r", tuple(prompt), sampling), seed))
        requests[-1].token_ids += output
    sampler, times = Sampler(option_rules(frozenset({2}), cpu)), []
    logits = torch.randn(4, num_rows, vocab_size).bfloat16()
    for number in range(_NUM_STEPS):
        own = logits[number % len(logits)]
        began = time.perf_counter()
        sampler.prepare(requests, cpu)
        results = sampler.sample(own, requests).results()
        times.append(1e3 * (time.perf_counter() - began))
        for request, sampled in zip(requests, results, strict=True):
            request.token_ids.append(sampled.token_id)
    return statistics.median(times[5:])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the sampling of decode steps.")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--vocab-size", type=int, nargs="+", default=[49_152, 151_936])
    parser.add_argument("--num-threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    torch.set_num_threads(1)
    native.set_threads(args.num_threads)
    print(f"{f'sampling of {args.rows} rows, ms a step':<36}" + "".join(f"{size:>12,}" for size in args.vocab_size))
    with torch.inference_mode():
        for name in options(max(args.vocab_size)):
            figures = [step_ms(args.rows, size, options(size)[name]) for size in args.vocab_size]
            print(f"{name:<36}" + "".join(f"{figure:>12.2f}" for figure in figures))


if __name__ == "__main__":
    main()
