"""The text of one choice: detokenizer, stop strings and ``min_tokens`` combined.

Owns: finding the token that completed a stop string. Leaves to others: cancelling the request at the worker, and all
other finish reasons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorafleet.workers.text.detokenizer import IncrementalDetokenizer
from lorafleet.workers.text.stop import StopMatcher
from lorafleet.workers.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Delta:
    """The result of one push.

    text: safe to send. stop_reason: the stop string that ended the choice, or None. num_tokens_used: how many of the
    pushed tokens belong to the choice; fewer than pushed only if a stop string was complete before the last.
    """

    text: str
    stop_reason: str | None
    num_tokens_used: int


class OutputText:
    """Turns the tokens of one choice into text that is safe to send."""

    __slots__ = ("_detokenizer", "_matcher", "_min_tokens", "_num_tokens", "_stopped")

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        *,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        """prompt_ids: the prompt or its last ids. min_tokens: up to this many tokens complete no stop string. shown:
        ids of special tokens that are not skipped."""
        self._detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids, skip_special_tokens, shown)
        self._matcher = StopMatcher(stop, include_stop_str_in_output) if stop else None
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._stopped: str | None = None

    def push(self, token_ids: Sequence[int], finished: bool = False, *, hide_last: bool = False) -> Delta:
        """Add tokens; `finished`, set with the last ones, releases the text held back.

        hide_last: the last id is a stop token of the request, counted but not shown. After a stop string all further
        tokens are unused: the delta is empty and repeats the stop reason.
        """
        if self._stopped is not None:
            return Delta("", self._stopped, 0)
        visible = token_ids[:-1] if hide_last else token_ids
        detokenizer, matcher = self._detokenizer, self._matcher
        if matcher is None:
            text = detokenizer.push(visible)
            return Delta(text + detokenizer.finish() if finished else text, None, len(token_ids))
        released = ""
        for position, token_id in enumerate(visible, start=1):
            self._num_tokens += 1
            text = detokenizer.push((token_id,))
            if text:
                safe, self._stopped = matcher.push(text, self._num_tokens > self._min_tokens)
                released += safe
                if self._stopped is not None:
                    return Delta(released, self._stopped, position)
        if finished:
            safe, self._stopped = matcher.push(detokenizer.finish(), self._num_tokens > self._min_tokens)
            released += safe + matcher.finish()
        return Delta(released, self._stopped, len(token_ids))
