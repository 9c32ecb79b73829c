"""A child process that holds transformers' model: it runs one static batch, like a script without a server.

python -m benchmarks.transformers_child MODEL
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
import transformers

from benchmarks.child import answer_calls
from benchmarks.workloads import Workload, make_requests


class TransformersChild:
    def __init__(self, model: str) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()

    def run(self, workload: dict[str, Any], seed: int, vocab_size: int) -> dict[str, Any]:
        """Run all requests in one greedy batch; the prompts have equal lengths, so there is no padding."""
        made = Workload(**workload)
        requests = make_requests(made, [], vocab_size=vocab_size, seed=seed)
        ids = torch.tensor([request.prompt_token_ids for request in requests])
        began = time.perf_counter()
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=made.num_output_tokens,
                max_new_tokens=made.num_output_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        elapsed_s = time.perf_counter() - began
        num_output = output.shape[0] * (output.shape[1] - ids.shape[1])
        if num_output != made.num_requests * made.num_output_tokens:
            raise RuntimeError(f"{num_output} tokens instead of {made.num_requests * made.num_output_tokens}")
        return {
            "workload": made.name,
            "num_requests": made.num_requests,
            "elapsed_s": round(elapsed_s, 3),
            "output_tok_per_s": round(num_output / elapsed_s, 1),
        }

    def versions(self) -> dict[str, str]:
        return {"transformers": transformers.__version__, "torch": torch.__version__}


if __name__ == "__main__":
    child = TransformersChild(sys.argv[1])
    answer_calls({"run": child.run, "versions": child.versions})
