"""Fields of other servers' APIs that this server does not honour: OpenAI's, vLLM's, SGLang's, llama.cpp's, LoRAX's.

Owns: their names and, of each, the values that ask for nothing (null always does). Leaves to others: fields that are
honoured (schema.py; one that stands there is honoured, whatever is said here), what becomes of a field (field_rule.py).
"""

from __future__ import annotations

from typing import Final

Values = tuple[object, ...]

OTHER_NAMES: Final[dict[str, str]] = {
    "ignore_eos_token": "ignore_eos",  # LoRAX
    "max_new_tokens": "max_tokens",  # SGLang, LoRAX
    "min_new_tokens": "min_tokens",  # SGLang
    "n_predict": "max_tokens",  # llama.cpp
    "pinned": "pin",  # SGLang, of an adapter
    "rep_pen": "repetition_penalty",  # KoboldAI's clients
    "repeat_penalty": "repetition_penalty",  # llama.cpp
    "rid": "request_id",  # SGLang
    "sampler_seed": "seed",  # KoboldAI's clients
    "sampling_seed": "seed",  # SGLang
    "stop_sequences": "stop",  # LoRAX
    "stopping_strings": "stop",  # text-generation-webui's clients
}
"""Fields that mean what one of ours means, and are read as that."""

OF_CHAT: Final[dict[str, Values]] = {
    "add_generation_prompt": (True,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_reasoning": (True, False),
    "max_completion_tokens": (),
    "messages": (),
    "parallel_tool_calls": (True, False),
    "reasoning_effort": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
"""Fields with which a chat is rendered or its answer read; other endpoints refuse them."""

OF_COMPLETIONS: Final[dict[str, Values]] = {
    "best_of": (1,),
    "echo": (False,),
    "prompt": (),
    "suffix": ("",),
}
"""Fields of completions alone."""

OF_GENERATION: Final[dict[str, Values]] = {
    # OpenAI
    "audio": (),
    "modalities": (["text"],),
    "moderation": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM
    "guided_whitespace_pattern": (),
    "is_3d_lora_weight": (False,),
    "logits_processors": ([],),
    "logprob_token_ids": (),
    "lora_int_id": (),
    "prompt_embeds": (),
    "repetition_detection": (),
    "return_prompt_text": (False,),
    "spaces_between_special_tokens": (True,),
    "structural_tag": (),
    "thinking_token_budget": (-1,),
    "truncation_side": (),
    "vllm_xargs": ({},),
    "watermarking": (False,),
    # SGLang
    "custom_logit_processor": (),
    "ebnf": (),
    "input_ids": (),
    "json_schema": (),
    "lora_path": (),
    "no_stop_trim": (False,),
    "reasoning": ({},),
    "regex": (),
    "return_cached_tokens_details": (False,),
    "return_hidden_states": (False,),
    "return_logprob": (False,),
    "return_meta_info": (False,),
    "return_prompt_token_ids": (False,),
    "return_routed_experts": (False,),
    "separate_reasoning": (True,),
    "session_params": ({},),
    "stop_regex": ([],),
    "stream_reasoning": (True,),
    "task": (),
    "token_ids_logprob": (),
    "top_logprobs_num": (0,),
    # llama.cpp and the clients that send its samplers' settings to every server
    "adaptive_target": (-1, -0.01),
    "add_bos_token": (True,),
    "ban_eos_token": (False,),
    "banned_strings": ([], ""),
    "banned_tokens": ([], ""),
    "custom_token_bans": ([], ""),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "grammar": ("",),
    "grammar_string": ("",),
    "guidance_scale": (1,),
    "image_data": ([],),
    "lora": ([],),
    "min_keep": (0, 1),
    "min_length": (0,),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "n_indent": (0,),
    "n_probs": (0,),
    "negative_prompt": ("",),
    "no_repeat_ngram_size": (0,),
    "nsigma": (0, -1),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "post_sampling_probs": (False,),
    "reasoning_format": ("auto", "none"),
    "rep_pen_range": (0,),
    "repeat_last_n": (-1,),
    "repetition_penalty_range": (0, -1),
    "return_tokens": (False,),
    "sampler_order": ([],),
    "sampler_priority": ([],),
    "samplers": ([],),
    "skew": (0,),
    "smoothing_factor": (0,),
    "t_max_predict_ms": (0,),
    "temperature_last": (False,),
    "tfs": (1,),
    "tfs_z": (1,),
    "top_a": (0,),
    "top_n_sigma": (0, -1),
    "typ_p": (1,),
    "typical": (1,),
    "xtc_probability": (0,),
    # LoRAX
    "adapter_id": (),
    "adapter_source": (),
    "apply_chat_template": (False,),
    "decoder_input_details": (False,),
    "do_sample": (True,),
    "inputs": (),
    "merged_adapters": (),
    "parameters": ({},),
    "return_full_text": (False,),
    "return_k_alternatives": (0,),
    "truncate": (),
    "typical_p": (1,),
    "watermark": (False,),
}
"""Fields that would change the answer of completions and chat."""

OF_ADAPTERS: Final[dict[str, Values]] = {
    "added_tokens_config": ({},),  # SGLang
    "base_model_name": (),
    "is_3d_lora_weight": (False,),
    "lora_int_id": (),
}
"""Fields that would change which adapter is loaded or unloaded, or how."""

OF_DETOKENIZE: Final[dict[str, Values]] = {"skip_special_tokens": (False,)}

OF_STREAM_OPTIONS: Final[dict[str, Values]] = {"include_obfuscation": (False,)}

INSTEAD: Final = {
    "function_call": "Send tool_choice instead.",
    "functions": "Send them as tools instead.",
}
"""Refused fields that another one has replaced."""

HARMLESS: Final[frozenset[str]] = frozenset(
    {
        # OpenAI
        "include_obfuscation",
        "prediction",
        "prompt_cache_options",
        "prompt_cache_retention",
        "service_tier",
        "store",
        # vLLM
        "ec_transfer_params",
        "guided_decoding_backend",
        "kv_transfer_params",
        "media_io_kwargs",
        "mm_processor_kwargs",
        "return_mm_kwargs",
        "return_token_offsets",
        "routed_experts_prompt_start",
        "session_id",
        "stream_interval",
        # SGLang
        "bootstrap_host",
        "bootstrap_port",
        "bootstrap_room",
        "custom_labels",
        "custom_params",
        "data_parallel_rank",
        "extra_key",
        "images_config",
        "max_dynamic_patch",
        "min_dynamic_patch",
        "ngram_corpus_id",
        "routed_dp_rank",
        "use_audio_in_video",
        # llama.cpp and its clients: settings of samplers that another field turns on, and of a server's own memory
        "adaptive_decay",
        "cache_prompt",
        "dry_allowed_length",
        "dry_base",
        "dry_penalty_last_n",
        "dry_sequence_breakers",
        "dynatemp_exponent",
        "id_slot",
        "mirostat_eta",
        "mirostat_tau",
        "n_discard",
        "n_keep",
        "return_progress",
        "smoothing_curve",
        "timings_per_token",
        "truncation_length",
        "xtc_threshold",
        # LoRAX
        "api_token",
        "details",
    }
)
"""Known fields that do not change the answer, and are ignored like unknown ones."""

HARMLESS_VALUES: Final[dict[str, Values]] = {
    "prediction": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
}
"""Of harmless fields, the values that ask for nothing; other fields of this kind have none."""
