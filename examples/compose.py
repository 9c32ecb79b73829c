"""Two adapters answer together, each with a weight; nothing is merged.

make demo                                      # in another terminal
.venv/bin/python examples/compose.py [--url http://127.0.0.1:8000/v1]
"""

from __future__ import annotations

import argparse

from openai import OpenAI

QUESTION = "What do you think about the weather today?"


def main() -> None:
    parser = argparse.ArgumentParser(description="One question, less and less of a pirate.")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    client = OpenAI(base_url=parser.parse_args().url, api_key="none")
    for weight in (1.0, 0.7, 0.4, 0.1):
        answer = client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=32,
            extra_body={"adapters": [{"name": "pirate", "weight": weight}, {"name": "json", "weight": -0.2}]},
        )
        print(f"{weight:g} of pirate: {answer.choices[0].message.content}")


if __name__ == "__main__":
    main()
