"""The base model and its adapters through the OpenAI SDK: one chat, one stream, all models at once.

make demo                                      # in another terminal
.venv/bin/python examples/openai_client.py [--url http://127.0.0.1:8000/v1]
"""

from __future__ import annotations

import argparse
import asyncio

from openai import AsyncOpenAI

QUESTIONS = {
    "smollm2": "What is the capital of France?",
    "sql": "Table: cars(id, brand, price)\nQuestion: What is the highest price?",
    "pirate": "What do you think about the weather today?",
    "json": "Extract the facts: Olga Petrov is a 41 year old baker who lives in Lisbon.",
}


async def ask(client: AsyncOpenAI, model: str) -> str:
    """Return the whole answer of one model."""
    answer = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTIONS[model]}], temperature=0, max_tokens=64
    )
    return answer.choices[0].message.content or ""


async def stream(client: AsyncOpenAI, model: str) -> None:
    """Print one model's answer as it comes."""
    chunks = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTIONS[model]}],
        temperature=0,
        max_tokens=64,
        stream=True,
    )
    async for chunk in chunks:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


async def main() -> None:
    parser = argparse.ArgumentParser(description="Ask the demo's models.")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    async with AsyncOpenAI(base_url=parser.parse_args().url, api_key="none") as client:
        print("One stream of pirate:")
        await stream(client, "pirate")
        print("All models in one batch:")
        for model, answer in zip(QUESTIONS, await asyncio.gather(*(ask(client, m) for m in QUESTIONS)), strict=True):
            print(f"{model:<8} {answer}")


if __name__ == "__main__":
    asyncio.run(main())
