"""Chat templates in the styles of well-known families, short ones written for the tests, and their control tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One style. user: the pieces of the prompt [{"role": "user", "content": ...}]; None stands for the content."""

    template: str
    user: tuple[str | None, ...]
    trims: bool = False


CHATML = Family(
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ("<|im_start|>", "user\n", None, "<|im_end|>", "\n", "<|im_start|>", "assistant\n"),
)
LLAMA_3 = Family(
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    (
        *("<s>", "<|start_header_id|>", "user", "<|end_header_id|>", "\n\n", None, "<|eot_id|>"),
        *("<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n"),
    ),
    trims=True,
)
MISTRAL = Family(
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ ' ' ~ m.content ~ eos_token }}{% endif %}{% endfor %}",
    ("<s>", "[INST]", " ", None, " ", "[/INST]"),
)
GEMMA = Family(
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "<start_of_turn>{{ role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    ("<s>", "<start_of_turn>", "user\n", None, "<end_of_turn>", "\n", "<start_of_turn>", "model\n"),
    trims=True,
)
PHI = Family(  # whose control tokens the template puts together from a role
    "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ m.content ~ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    ("<|user|>", None, "<|end|>", "<|assistant|>"),
)
QWEN_3 = Family(
    "{% macro turn(role, body) %}<|im_start|>{{ role }}\n{{ body }}<|im_end|>\n{% endmacro %}"
    "{% for m in messages %}{% if m.role == 'assistant' and '</think>' in m.content %}"
    "{% set body = m.content.split('</think>')[-1].lstrip('\n') %}{% else %}{% set body = m.content %}{% endif %}"
    "{{ turn(m.role, body) }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    ("<|im_start|>", "user\n", None, "<|im_end|>", "\n", "<|im_start|>", "assistant\n"),
)
PARTS = Family(
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ("<|im_start|>", "user\n", None, "<|im_end|>", "\n", "<|im_start|>", "assistant\n"),
)

FAMILIES = {
    "chatml": CHATML,
    "llama-3": LLAMA_3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "phi": PHI,
    "qwen-3": QWEN_3,
    "parts": PARTS,
}
CONTROL_TOKENS = sorted(
    {"</s>", "<|system|>", "<|tool|>"}
    | {
        piece
        for family in FAMILIES.values()
        for piece in family.user
        if piece is not None and piece.startswith(("<", "[")) and piece.endswith((">", "]"))
    }
)
