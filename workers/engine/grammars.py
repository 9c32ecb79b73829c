"""Grammars compiled against vocabularies, on threads; requests wait for theirs before they are scheduled.

Owns: vocabularies by tokenizer digest, compiled grammars, the last of both, and the requests that wait. Leaves to
others: a tokenizer's files (whoever has the engine), following a grammar (model/rules/grammar_masks.py).
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import llguidance

from lorafleet.workers.errors import (
    AdapterUnavailableError,
    InternalError,
    InvalidRequestError,
    LoRAFleetError,
    ModelError,
    cut,
)
from lorafleet.workers.grammars.limits import parser_limits
from lorafleet.workers.grammars.threads import grammar_threads
from lorafleet.workers.model.rules.grammar_masks import GrammarMasks
from lorafleet.workers.scheduling.request import GenerateRequest, Request
from lorafleet.workers.text.files import read_text_files
from lorafleet.workers.text.tokenizer import Tokenizer

MAX_VOCABULARIES: Final = 8  # beside the base model's, of some 100 MB
MAX_GRAMMARS: Final = 256
MAX_GRAMMAR_CHARS: Final = 16 << 20  # of all of these
_NUM_THREADS: Final = 2

TokenizerSource = Callable[[str], Tokenizer | None]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Compiled:
    """A report: a grammar is compiled, or cannot be."""

    key: tuple[str, str]
    grammar: CompiledGrammar | LoRAFleetError


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """A grammar for one vocabulary, at its start. Copies are followed."""

    start: llguidance.LLMatcher
    vocab_size: int


class Vocabularies:
    """The vocabularies of tokenizers as the compiler takes them, by digest; the base model's is ''. Thread-safe."""

    def __init__(self, model_dir: Path) -> None:
        self.tokenizer_of: TokenizerSource = lambda digest: None  # of an adapter's own
        self._model_dir = model_dir
        self._lock = threading.Lock()
        self._base: llguidance.LLTokenizer | None = None
        self._own: OrderedDict[str, llguidance.LLTokenizer] = OrderedDict()  # least recently used first

    def get(self, digest: str) -> llguidance.LLTokenizer:
        """Return a vocabulary. Slow for a new one, and Python's lock is held meanwhile.

        Raises `AdapterUnavailableError` if the tokenizer is not known here, `InvalidRequestError` for one that the
        compiler does not take.
        """
        with self._lock:
            if digest:
                return self._get_own(digest)
            if self._base is None:
                try:
                    tokenizer = Tokenizer.from_files(read_text_files(self._model_dir))
                except ModelError as error:
                    raise InvalidRequestError(
                        f"The model's tokenizer cannot be read, so structured output is not possible: {error.message}"
                    ) from error
                self._base = _vocabulary(tokenizer)
            return self._base

    def _get_own(self, digest: str) -> llguidance.LLTokenizer:
        vocabulary = self._own.get(digest)
        if vocabulary is None:
            tokenizer = self.tokenizer_of(digest)
            if tokenizer is None:
                raise AdapterUnavailableError("The adapter's tokenizer is not known here any more. Try again.")
            vocabulary = self._own[digest] = _vocabulary(tokenizer)
            if len(self._own) > MAX_VOCABULARIES:
                self._own.popitem(last=False)
        self._own.move_to_end(digest)
        return vocabulary


class Grammars:
    """The grammars of one engine's requests. Used by the stepping thread, but for `prepare` and `close`."""

    def __init__(self, model_dir: Path, masks: GrammarMasks, report: Callable[[Compiled], None]) -> None:
        """report: called on a thread when a grammar is compiled."""
        self.vocabularies = Vocabularies(model_dir)
        self._masks = masks
        self._report = report
        self._pool: ThreadPoolExecutor | None = None  # started with the first request
        self._compiled: OrderedDict[tuple[str, str], CompiledGrammar] = OrderedDict()  # least recently used first
        self._num_chars = 0
        self._waiting: dict[str, GenerateRequest] = {}  # by request id, in the order of arrival
        self._compiling: set[tuple[str, str]] = set()
        self._ready: dict[str, CompiledGrammar] = {}  # of requests that have not begun

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting

    def prepare(self) -> None:
        """Read the base model's vocabulary now, which no step then waits for. Without one nothing happens."""
        try:
            self.vocabularies.get("")
        except InvalidRequestError as error:
            logger.warning("%s", error.message)

    def admit(self, request: GenerateRequest) -> bool:
        """Return whether a request may be scheduled; otherwise it waits for its grammar."""
        if not request.sampling.grammar:
            return True
        key = _key(request)
        known = self._compiled.get(key)
        if known is not None:
            self._compiled.move_to_end(key)
            self._ready[request.request_id] = known
            return True
        self._waiting[request.request_id] = request
        if key not in self._compiling:
            if self._pool is None:
                self._pool = grammar_threads(_NUM_THREADS, "grammars")
            self._compiling.add(key)
            self._pool.submit(self._compile, key)
        return False

    def take(self, compiled: Compiled) -> list[GenerateRequest]:
        """Return the requests that waited for a grammar. If it is an error, they fail with it."""
        key, grammar = compiled.key, compiled.grammar
        self._compiling.discard(key)
        found = [request for request in self._waiting.values() if _key(request) == key]
        for request in found:
            del self._waiting[request.request_id]
        if isinstance(grammar, CompiledGrammar):
            self._remember(key, grammar)
            self._ready |= {request.request_id: grammar for request in found}
        return found

    def discard(self, request_id: str) -> bool:
        """Forget a request that has not begun; return whether it waited."""
        self._ready.pop(request_id, None)
        return self._waiting.pop(request_id, None) is not None

    def begin(self, request: Request) -> None:
        """Have a request follow its grammar, if it has one."""
        grammar = self._ready.pop(request.request_id, None)
        if grammar is not None:
            self._masks.begin(request, grammar.start.deep_copy(), grammar.vocab_size)

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, key: tuple[str, str]) -> None:
        grammar: CompiledGrammar | LoRAFleetError
        try:
            grammar = compile_grammar(self.vocabularies.get(key[0]), key[1])
        except LoRAFleetError as error:
            grammar = error
        except Exception:
            logger.exception("a grammar cannot be compiled")
            grammar = InternalError("The grammar could not be compiled; the worker's log says why.")
        self._report(Compiled(key, grammar))

    def _remember(self, key: tuple[str, str], grammar: CompiledGrammar) -> None:
        self._compiled[key] = grammar
        self._num_chars += len(key[1])
        while len(self._compiled) > 1 and (len(self._compiled) > MAX_GRAMMARS or self._num_chars > MAX_GRAMMAR_CHARS):
            gone, _ = self._compiled.popitem(last=False)
            self._num_chars -= len(gone[1])


def compile_grammar(vocabulary: llguidance.LLTokenizer, text: str) -> CompiledGrammar:
    """Compile a grammar and try its first mask. Raises `InvalidRequestError`."""
    start = llguidance.LLMatcher(vocabulary, text, log_level=0, limits=parser_limits())
    trial = start.deep_copy()
    if not trial.is_error() and not any(trial.compute_bitmask()) and not trial.is_error():
        raise InvalidRequestError("The grammar allows no token at all.", param="structured_outputs")
    if trial.is_error():
        raise InvalidRequestError(
            f"The grammar cannot be enforced: {cut(' '.join(trial.get_error().split()))}.", param="structured_outputs"
        )
    return CompiledGrammar(start, vocabulary.vocab_size)


def _vocabulary(tokenizer: Tokenizer) -> llguidance.LLTokenizer:
    try:
        return llguidance.LLTokenizer(tokenizer.to_json(), eos_token=sorted(tokenizer.eos_token_ids))
    except Exception as error:  # the library raises bare Exceptions
        raise InvalidRequestError(
            f"Structured output is not possible with this model's tokenizer: {cut(str(error))}."
        ) from error


def _key(request: GenerateRequest) -> tuple[str, str]:
    return request.text_digest, request.sampling.grammar
