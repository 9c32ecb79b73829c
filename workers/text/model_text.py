"""All that turns text into token ids and back for one model: its tokenizer, its chat template, its sampling defaults.

Owns: building them from the files that the controller sends. Leaves to others: fetching (routes.py), threads
(state.py).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorafleet.workers.errors import InvalidRequestError
from lorafleet.workers.generation_defaults import parse_generation_defaults
from lorafleet.workers.params import SamplingParams
from lorafleet.workers.text.chat_template import ChatTemplate
from lorafleet.workers.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelText:
    """Immutable; its methods may run on any thread. sampling_defaults: of generation_config.json."""

    digest: str
    tokenizer: Tokenizer
    template: ChatTemplate
    sampling_defaults: Mapping[str, float | int]

    @classmethod
    def from_files(cls, digest: str, files: Mapping[str, bytes], known: Iterable[ModelText] = ()) -> ModelText:
        """known: whose tokenizers may be used again. Raises ModelError for files that are no tokenizer."""
        tokenizer = Tokenizer.from_files(files, [text.tokenizer for text in known])
        return cls(digest, tokenizer, ChatTemplate.from_tokenizer(tokenizer), sampling_defaults(files))

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        add_special_tokens: bool,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Messages to a prompt's ids. max_tokens: see `Tokenizer.encode`.

        Raises InvalidRequestError for what the template does not take, ContextLengthError.
        """
        text = self.template.render(
            messages, add_generation_prompt=add_generation_prompt, **self.tokenizer.special_tokens
        )
        try:
            return self.tokenizer.encode(text, add_special_tokens, max_tokens=max_tokens)
        except InvalidRequestError as error:
            error.param = "messages"
            raise


def sampling_defaults(files: Mapping[str, bytes]) -> dict[str, float | int]:
    """What generation_config.json recommends. Values that no request could ask for are left out, with a warning.

    Raises ModelError for a file that cannot be read.
    """
    name = "generation_config.json"
    defaults: dict[str, float | int] = {}
    for field, value in parse_generation_defaults(files.get(name, b"{}"), name).items():
        try:
            SamplingParams(**{field: value})
        except InvalidRequestError as error:
            logger.warning("%s: %s", name, error.message)
        else:
            defaults[field] = value
    return defaults
