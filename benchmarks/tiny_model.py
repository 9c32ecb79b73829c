"""A small random model, with steps of a millisecond, for benchmarks of everything but the model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig


def write_tiny_model(directory: Path) -> Path:
    """Write a model of four layers of 128, float32 safetensors, no tokenizer. Return the directory."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=1,
        bos_token_id=2,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # larger than usual, so that answers depend on the prompt
            parameter.data.normal_(0.0, 0.08)
    model.save_pretrained(directory)
    return directory
