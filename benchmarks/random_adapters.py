"""Writes random PEFT adapters for a model, and prints the flags to serve them.

python -m benchmarks.random_adapters --model DIR --out DIR [--count 64] [--rank 8]
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

import torch
from safetensors.torch import save_file

from lorafleet.workers.model.architecture import ModelSpec, read_model_spec


def write_adapter(spec: ModelSpec, directory: Path, *, lora_rank: int, seed: int, strength: float = 0.01) -> None:
    """Write an adapter on all seven linears in bfloat16. strength: B's; the default keeps the logits finite."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(spec.num_layers):
        for name, (num_in, num_out) in spec.linears.items():
            block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            prefix = f"base_model.model.model.layers.{layer}.{block}.{name}"
            a_RI = torch.randn(lora_rank, num_in, generator=generator) / num_in**0.5
            b_OR = torch.randn(num_out, lora_rank, generator=generator) * strength
            tensors[f"{prefix}.lora_A.weight"] = a_RI.bfloat16()
            tensors[f"{prefix}.lora_B.weight"] = b_OR.bfloat16()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora_rank,
        "lora_alpha": 2 * lora_rank,
        "target_modules": sorted(spec.linears),
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2))


def write_adapters(
    model_dir: Path, out_dir: Path, *, count: int, lora_rank: int = 8, strength: float = 0.01
) -> dict[str, Path]:
    """Write `count` different adapters below out_dir. Return their directories by name."""
    spec = read_model_spec(model_dir)
    adapters = {f"random-{i:03d}": out_dir / f"random-{i:03d}" for i in range(count)}
    for seed, directory in enumerate(adapters.values()):
        write_adapter(spec, directory, lora_rank=lora_rank, seed=seed, strength=strength)
    return adapters


def main() -> None:
    parser = argparse.ArgumentParser(description="Make random adapters for a model.")
    parser.add_argument("--model", type=Path, required=True, help="model directory")
    parser.add_argument("--out", type=Path, required=True, help="directory to write the adapters to")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    args = parser.parse_args()
    adapters = write_adapters(args.model, args.out, count=args.count, lora_rank=args.rank)
    print("--lora-modules " + " ".join(shlex.quote(f"{name}={path}") for name, path in adapters.items()))


if __name__ == "__main__":
    main()
