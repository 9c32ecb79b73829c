"""Cosines and sines of the rotary position embedding for every position, from transformers' RoPE parameters."""

from __future__ import annotations

import torch

from lorafleet.workers.model.architecture import ModelSpec


def cos_sin_table(spec: ModelSpec, max_model_len: int) -> torch.Tensor:
    """[max_model_len, head_dim] in float32: cosines in the first half of the columns, sines in the second.

    Su et al. 2021 (RoFormer); Llama 3's and YaRN's frequency scaling as transformers computes them.
    """
    parameters = spec.hf_config.rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
    rope_type = parameters.get("rope_type", "default")
    if rope_type == "default":
        exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
        inverse_frequencies, magnitude = 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    else:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        inverse_frequencies, magnitude = ROPE_INIT_FUNCTIONS[rope_type](spec.hf_config, torch.device("cpu"))
    angles = torch.outer(torch.arange(max_model_len, dtype=torch.float32), inverse_frequencies.float())
    return torch.cat([angles.cos(), angles.sin()], dim=1) * magnitude
