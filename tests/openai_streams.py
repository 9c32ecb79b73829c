"""Streams of the openai client with all stateful options, during a fault of the fleet."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable

import openai
from serving import Server

NUM_TOKENS = 700  # per choice; so many that none is complete before all eight streams have begun
PROMPTS = ["the quick", "over the lazy dog", "then", "brown fox"]

Answer = dict[int, tuple[str, list[str], str]]


def streams(server: Server, fault: Callable[[], None]) -> list[Answer]:
    """Run eight at once, of the base model and an adapter; the fault comes when all have their first tokens."""
    prepared, begun = threading.Barrier(8), threading.Barrier(9)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = [
            pool.submit(stream, server, ("tiny", "good")[number % 2], number, prepared, begun) for number in range(8)
        ]
        begun.wait(timeout=60)
        fault()
        return [answer.result() for answer in answers]


def stream(server: Server, model: str, number: int, prepared: threading.Barrier, begun: threading.Barrier) -> Answer:
    """Stream with all stateful options. Return each choice's text, tokens (by log-probabilities), finish reason."""
    is_first = True
    texts, tokens, reasons = {0: "", 1: ""}, {0: list[str](), 1: list[str]()}, {0: "", 1: ""}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        prepared.wait(timeout=60)  # creating a client takes longer than hundreds of tokens
        for chunk in client.completions.create(
            model=model,
            prompt=PROMPTS[number % len(PROMPTS)],
            max_tokens=NUM_TOKENS,
            n=2,
            seed=number,
            logprobs=2,
            stream=True,
            presence_penalty=0.5,
            frequency_penalty=0.3,
            stop=["no such text", "never said"],
            extra_body={"ignore_eos": True, "repetition_penalty": 1.1},
        ):
            if is_first:
                is_first = False
                begun.wait(timeout=60)
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                if choice.logprobs is not None:
                    tokens[choice.index] += choice.logprobs.tokens or []
                reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    return {index: (texts[index], tokens[index], reasons[index]) for index in texts}
