"""Log-probabilities in OpenAI's two shapes, and vLLM's for prompts.

Owns: the shapes. Leaves to others: which tokens count (streams/generation.py).

A token that is only part of a character is written as escaped bytes, as OpenAI does; with
`return_tokens_as_token_ids` every token is written as ``token_id:N``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypedDict

from lorafleet.workers.errors import InvalidRequestError
from lorafleet.workers.scheduling.logprobs import PromptLogprobs, TokenLogprobs
from lorafleet.workers.text.detokenizer import IncrementalDetokenizer
from lorafleet.workers.text.tokenizer import Tokenizer

LOWEST: Final = -9999.0
"""OpenAI's value for minus infinity, which JSON lacks."""
MAX_PROMPT_CANDIDATES: Final = 1 << 20  # of all prompts of a request, each token's own included


class ChatTop(TypedDict):
    """One candidate at one position."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(ChatTop):
    """One position of a chat answer."""

    top_logprobs: list[ChatTop]


class CompletionLogprobs(TypedDict):
    """All positions of a completion, in columns. The first token of an echoed prompt has no log-probabilities."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class PromptCandidate(TypedDict):
    """One candidate at one position of a prompt."""

    logprob: float
    rank: int
    decoded_token: str


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], *, as_ids: bool = False
) -> list[ChatToken]:
    """Return `logprobs.content` of a chat choice."""

    def top(token_id: int, logprob: float) -> ChatTop:
        data = tokenizer.token_bytes(token_id) or b""
        token = _id(token_id) if as_ids else _spell(data, "")
        return ChatTop(token=token, logprob=max(logprob, LOWEST), bytes=list(data))

    content = []
    for token_id, entry in zip(token_ids, logprobs, strict=False):
        candidates = zip(entry.top_ids, entry.top_logprobs, strict=True)
        content.append(
            ChatToken(**top(token_id, entry.logprob), top_logprobs=[top(*candidate) for candidate in candidates])
        )
    return content


def prompt_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: PromptLogprobs | None, num_top: int
) -> list[dict[str, PromptCandidate] | None]:
    """Return `prompt_logprobs`: null for the first token; for each other one the token itself and the best, by id."""
    positions: list[dict[str, PromptCandidate] | None] = [None]
    for token_id, entry in zip(token_ids[1:], logprobs or (), strict=True):
        ranked = [(token_id, entry.logprob, entry.rank)]
        ranked += zip(entry.top_ids[:num_top], entry.top_logprobs, range(1, num_top + 1), strict=False)
        position: dict[str, PromptCandidate] = {}
        for candidate, logprob, rank in ranked:
            position.setdefault(
                str(candidate),
                PromptCandidate(
                    logprob=max(logprob, LOWEST), rank=rank, decoded_token=tokenizer.decode_token(candidate)
                ),
            )
        positions.append(position)
    return positions


def check_num_prompt_candidates(prompts: Sequence[Sequence[int]], num_top: int | None) -> None:
    """Raises InvalidRequestError for prompts that have more candidates than the limit."""
    if num_top is None:
        return
    num_candidates = sum(map(len, prompts)) * (num_top + 1)
    if num_candidates > MAX_PROMPT_CANDIDATES:
        raise InvalidRequestError(
            f"The log-probabilities of the prompts would have {num_candidates} candidates; the limit is "
            f"{MAX_PROMPT_CANDIDATES}. Send fewer prompts at a time, or ask for fewer candidates.",
            param="prompt_logprobs",
        )


class CompletionColumns:
    """The columns of one completion choice, which a stream sends in pieces.

    text_offset: the start of each token in the choice's text; a token that is not shown (EOS) has no length.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], *, skip_special_tokens: bool, as_ids: bool
    ) -> None:
        """prompt_ids: the prompt if the text does not begin with it."""
        self._text = IncrementalDetokenizer(tokenizer, prompt_ids, skip_special_tokens)
        self._spell: Callable[[int], str] = (
            _id if as_ids else lambda token_id: _spell(tokenizer.token_bytes(token_id) or b"", "bytes:")
        )
        self._offset = 0

    def add_prompt(self, token_ids: Sequence[int], logprobs: PromptLogprobs | None, num_top: int) -> CompletionLogprobs:
        """Return the columns for an echoed prompt."""
        return self._add(token_ids, [None, *(logprobs or ())], num_top)

    def add(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> CompletionLogprobs:
        """Return the columns for the next tokens. The token itself is always among the candidates."""
        return self._add(token_ids, logprobs, None)

    def _add(
        self, token_ids: Sequence[int], logprobs: Iterable[TokenLogprobs | None], num_top: int | None
    ) -> CompletionLogprobs:
        columns = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
        for token_id, entry in zip(token_ids, logprobs, strict=False):
            token = self._spell(token_id)
            chosen: float | None = None
            top: dict[str, float] | None = None
            if entry is not None:
                candidates = zip(entry.top_ids[:num_top], entry.top_logprobs, strict=False)
                top = {self._spell(candidate): max(logprob, LOWEST) for candidate, logprob in candidates}
                chosen = max(entry.logprob, LOWEST)
                top.setdefault(token, chosen)
            columns["text_offset"].append(self._offset)
            columns["token_logprobs"].append(chosen)
            columns["tokens"].append(token)
            columns["top_logprobs"].append(top)
            self._offset += len(self._text.push((token_id,)))
        return columns


def joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    """Return the columns of both, one after the other."""
    return CompletionLogprobs(
        text_offset=first["text_offset"] + second["text_offset"],
        token_logprobs=first["token_logprobs"] + second["token_logprobs"],
        tokens=first["tokens"] + second["tokens"],
        top_logprobs=first["top_logprobs"] + second["top_logprobs"],
    )


def _id(token_id: int) -> str:
    return f"token_id:{token_id}"


def _spell(data: bytes, prefix: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in data)
