"""What an activated adapter (PEFT's `alora_invocation_tokens`) saves: a second turn that computes only what is new.

    python examples/activated_lora.py

A conversation with the demo model, then a check of it by an adapter: once by a plain LoRA, once by an activated one
with the same, freshly drawn weights (so what they say means nothing). Prints how many tokens of the check's prompt were
computed.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from lorafleet.workers import LLM, LoRARequest, SamplingParams
from lorafleet.workers.sources.demo import demo_model_dir

RANK, HIDDEN, NUM_KEYS, NUM_LAYERS = 8, 576, 192, 30  # of SmolLM2-135M


def write_adapter(directory: Path, invocation_tokens: list[int] | None) -> Path:
    """LoRA on v_proj; None: a plain one, which is applied to the whole prompt."""
    directory.mkdir()
    torch.manual_seed(0)
    weights = {}
    for layer in range(NUM_LAYERS):
        name = f"base_model.model.model.layers.{layer}.self_attn.v_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(RANK, HIDDEN) / HIDDEN**0.5
        weights[f"{name}.lora_B.weight"] = torch.randn(NUM_KEYS, RANK) * 0.02
    save_file(weights, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 16, "target_modules": ["v_proj"]}
    config["alora_invocation_tokens"] = invocation_tokens
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def main() -> None:
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    with (
        LLM(str(demo_model_dir()), enable_lora=True, max_model_len=2048) as llm,
        tempfile.TemporaryDirectory() as scratch,
    ):
        stats, encode = llm.llm_engine.engine.stats, llm.get_tokenizer().encode
        questions = "".join(f"<|im_start|>user\nWhat is {n} times {n + 1}?<|im_end|>\n" for n in range(40))
        prompt = encode(f"{questions}<|im_start|>assistant\n")
        invocation = encode("<|im_start|>check\n")
        plain = LoRARequest("plain", 1, str(write_adapter(Path(scratch) / "plain", None)))
        activated = LoRARequest("activated", 2, str(write_adapter(Path(scratch) / "activated", invocation)))
        (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        second = [*prompt, *output.outputs[0].token_ids, *invocation]
        for lora in (plain, activated):
            before = stats().num_prompt_tokens
            llm.generate([{"prompt_token_ids": second}], params, lora_request=lora, use_tqdm=False)
            num_computed = stats().num_prompt_tokens - before
            print(f"{lora.lora_name:<10}{num_computed:4} of {len(second)} tokens of the second prompt were computed")


if __name__ == "__main__":
    main()
