"""The engine without a server: the base model and an adapter in one batch.

.venv/bin/python examples/offline.py
"""

from __future__ import annotations

from pathlib import Path

from lorafleet.workers import LLM, LoRARequest, SamplingParams
from lorafleet.workers.sources.demo import demo_model_dir

SQL = Path(__file__).parent / "adapters" / "sql"
QUESTION = "Table: cars(id, brand, price)\nQuestion: What is the highest price?"


def main() -> None:
    params = SamplingParams(temperature=0, max_tokens=48)
    with LLM(str(demo_model_dir()), enable_lora=True, max_model_len=2048) as llm:
        adapters = [None, LoRARequest("sql", 1, str(SQL))]
        conversation = [{"role": "user", "content": QUESTION}]
        outputs = llm.chat([conversation] * len(adapters), params, lora_request=adapters, use_tqdm=False)
        for adapter, output in zip(adapters, outputs, strict=True):
            print(f"{adapter.lora_name if adapter else 'base':<5} {output.outputs[0].text.strip()}")


if __name__ == "__main__":
    main()
