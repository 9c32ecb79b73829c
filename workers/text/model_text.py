"""A model's tokenizer, chat template and sampling defaults, for conversion between text and token ids.

Owns: building them from the files that the controller sends. Leaves to others: fetching the files, and threads (both in
the gateway).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorafleet.workers.answers.call_syntax import CallSyntax, PythonicSyntax
from lorafleet.workers.answers.profile import PROFILE_FILE, Profile, read_profile
from lorafleet.workers.answers.tool_formats import HERMES, TOOL_FORMATS, ToolFormat, recognised
from lorafleet.workers.errors import InvalidRequestError
from lorafleet.workers.params import SamplingParams
from lorafleet.workers.text.chat_template import ChatTemplate
from lorafleet.workers.text.generation_defaults import parse_generation_defaults
from lorafleet.workers.text.tokenizer import Tokenizer
from lorafleet.workers.text.tool_messages import ToolForm

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelText:
    """Immutable and thread-safe.

    sampling_defaults: from generation_config.json. tool_form: what the template takes. template_calls: the name of the
    format in which it asks for calls; None for one that is not known. profile: from the files, if they have one.
    """

    digest: str
    tokenizer: Tokenizer
    template: ChatTemplate
    sampling_defaults: Mapping[str, float | int]
    tool_form: ToolForm
    template_calls: str | None
    profile: Profile

    @classmethod
    def from_files(cls, digest: str, files: Mapping[str, bytes], known: Iterable[ModelText] = ()) -> ModelText:
        """Build from file contents by name. known: models whose tokenizers may be shared. Raises ModelError for files
        that are not a tokenizer."""
        tokenizer = Tokenizer.from_files(files, [text.tokenizer for text in known])
        template = ChatTemplate.from_tokenizer(tokenizer)
        source = tokenizer.chat_templates.get("tool_use") or tokenizer.chat_templates.get("default", "")
        return cls(
            digest=digest,
            tokenizer=tokenizer,
            template=template,
            sampling_defaults=sampling_defaults(files),
            tool_form=ToolForm.of(
                source, takes_tools=template.takes_tools, takes_system=_takes_system(template, tokenizer)
            ),
            template_calls=recognised(source),
            profile=read_profile(files[PROFILE_FILE]) if PROFILE_FILE in files else Profile(),
        )

    def tool_format(self, default: str | None = None) -> ToolFormat:
        """Return the format of calls: the profile's, else the one called `default`, else the template's or Hermes'."""
        name = self.profile.tool_call_parser or default or self.template_calls
        return HERMES if name is None else TOOL_FORMATS[name]

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        add_special_tokens: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        call_syntax: CallSyntax | PythonicSyntax | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Convert messages to a prompt's ids. tools: functions, in OpenAI's form, that the model may call.

        call_syntax: how it writes calls, for a template that knows none; by default as `tool_format` says.
        chat_template_kwargs: further variables of the template. max_tokens: see `Tokenizer.encode`.

        Raises InvalidRequestError for messages the template does not accept, ContextLengthError.
        """
        messages, tools = self.tool_form.messages(messages, tools, call_syntax or self.tool_format().syntax)
        text = self.template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            **(chat_template_kwargs or {}),
            **self.tokenizer.special_tokens,
        )
        try:
            return self.tokenizer.encode(text, add_special_tokens, max_tokens=max_tokens)
        except InvalidRequestError as error:
            error.param = "messages"
            raise


def _takes_system(template: ChatTemplate, tokenizer: Tokenizer) -> bool:
    messages = [{"role": "system", "content": "Hello"}, {"role": "user", "content": "Hello"}]
    try:
        template.render(messages, **tokenizer.special_tokens)
    except InvalidRequestError:
        return False
    return True


def sampling_defaults(files: Mapping[str, bytes]) -> dict[str, float | int]:
    """Return generation_config.json's recommendations. Values that no request may have are dropped, with a warning.

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
