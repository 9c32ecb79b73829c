"""An adapter comes, is replaced and goes while the server runs; requests name it in between.

make demo                                      # in another terminal; it allows what is below examples/adapters
.venv/bin/python examples/load_and_unload.py [--url http://127.0.0.1:8000/v1]
"""

from __future__ import annotations

import argparse

from openai import OpenAI

QUESTION = "Extract the facts: Olga Petrov is a 41 year old baker who lives in Lisbon."


def ask(client: OpenAI, model: str) -> str:
    """Return the answer of one model."""
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=48
    )
    return answer.choices[0].message.content or ""


def main() -> None:
    parser = argparse.ArgumentParser(description="Load an adapter, replace it, unload it.")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    client = OpenAI(base_url=parser.parse_args().url, api_key="none")
    client.post("/load_lora_adapter", body={"lora_name": "visitor", "lora_path": "pirate"}, cast_to=str)
    print("loaded:  ", ask(client, "visitor"))
    new = {"lora_name": "visitor", "lora_path": "json", "load_inplace": True}
    client.post("/load_lora_adapter", body=new, cast_to=str)
    print("replaced:", ask(client, "visitor"))
    client.post("/unload_lora_adapter", body={"lora_name": "visitor"}, cast_to=str)
    names = [model.id for model in client.models.list()]
    print("unloaded:", ", ".join(names))


if __name__ == "__main__":
    main()
