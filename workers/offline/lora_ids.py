"""Adapters by the caller's `lora_int_id`: one id stands for one adapter until it is removed or loaded in place.

The content at an id's path counts: after its files change, the id stands for the new content from its next request on.
If the files are gone, the content read before stays in use.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from lorafleet.workers.adapters.format import AdapterSpec
from lorafleet.workers.engine.aliases import Aliases
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.engine.registered import FreedBytes
from lorafleet.workers.errors import AdapterConflictError
from lorafleet.workers.params import LoRARequest
from lorafleet.workers.sources.directory_stamp import DirectoryStamp
from lorafleet.workers.text.adapter_tokenizers import AdapterTokenizers
from lorafleet.workers.text.files import files_digest
from lorafleet.workers.text.model_text import ModelText
from lorafleet.workers.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, eq=False)
class KnownAdapter:
    """The adapter of an id, as it was read."""

    request: LoRARequest
    stamp: DirectoryStamp | None  # at the time of reading; None: no such directory
    spec: AdapterSpec
    text: ModelText | None  # its own tokenizer and template; None: the model's


class LoRAIds:
    """Registers adapters with the engine at first use. Thread-safe; calls wait only for earlier ones on their id."""

    def __init__(self, engine: Engine, texts: AdapterTokenizers) -> None:
        self._engine = engine
        self._texts = texts
        self._aliases: Aliases[int] = Aliases(engine)
        self._known: dict[int, KnownAdapter] = {}

    def known(self) -> set[int]:
        return set(self._known)

    def tokenizer(self, digest: str) -> Tokenizer | None:
        """Return the tokenizer of an adapter's text by its digest; None if no adapter has it any more."""
        texts = (known.text for known in list(self._known.values()))
        return next((text.tokenizer for text in texts if text is not None and text.digest == digest), None)

    def find(self, request: LoRARequest) -> Future[KnownAdapter]:
        """Return the id's adapter; read it at the first call and after its files have changed.

        Fails with `AdapterConflictError` if the id stands for another adapter and load_inplace is not set,
        `AdapterRefusedError`, `AdapterUnavailableError`, `ModelError` (a broken tokenizer).
        """
        return self._in_turn(request, is_anew=False)

    def add(self, request: LoRARequest) -> Future[KnownAdapter]:
        """`find`, then load it into the host cache; with load_inplace, read it again in any case."""
        return self._in_turn(request, is_anew=request.load_inplace, prefetches=True)

    def pin(self, lora_int_id: int) -> bool:
        """Keep the id's adapter in a slot until it is removed. Return False if the id is unknown.

        Raises `AdapterConflictError` if only one slot is left unpinned.
        """
        return self._aliases.pin(lora_int_id)

    def remove(self, lora_int_id: int) -> Future[Future[FreedBytes] | None]:
        """Remove an id; see `Aliases.remove`. Fails with `UnknownModelError`."""

        def change(_: None) -> Future[FreedBytes] | None:
            self._known.pop(lora_int_id, None)
            return self._aliases.drop(lora_int_id)

        return self._aliases.in_turn(lora_int_id, lambda: None, change, "")

    def close(self) -> None:
        self._aliases.close()

    def _in_turn(self, request: LoRARequest, *, is_anew: bool, prefetches: bool = False) -> Future[KnownAdapter]:
        return self._aliases.in_turn(
            request.lora_int_id,
            partial(self._read, request, is_anew),
            partial(self._put, prefetches),
            request.lora_path,
        )

    def _read(self, request: LoRARequest, is_anew: bool) -> KnownAdapter:
        known = self._known.get(request.lora_int_id)
        if known is not None and not _is_the_same(known.request, request):
            if not request.load_inplace:
                raise AdapterConflictError(
                    f"lora_int_id {request.lora_int_id} stands for {known.request.lora_name!r} "
                    f"({known.request.lora_path}), not for {request.lora_name!r} ({request.lora_path}). Give each "
                    "adapter its own id, or set load_inplace."
                )
            known = None
        stamp = DirectoryStamp.of(request.lora_path)
        if known is not None and not is_anew and _is_still(known.stamp, stamp):
            return known
        spec = self._engine.read_adapter(request.lora_path)
        return KnownAdapter(request, stamp, spec, self._text(spec))

    def _text(self, spec: AdapterSpec) -> ModelText | None:
        files = self._texts.files(spec.path)
        if files is None:
            return None
        digest = files_digest(files)
        texts = (known.text for known in list(self._known.values()))
        alike = next((text for text in texts if text is not None and text.digest == digest), None)
        return alike or ModelText.from_files(digest, files)

    def _put(self, prefetches: bool, known: KnownAdapter) -> KnownAdapter:
        lora_int_id = known.request.lora_int_id
        if self._known.get(lora_int_id) is not known:
            self._aliases.put(lora_int_id, known.spec)
            self._known[lora_int_id] = known
        if prefetches:
            self._engine.prefetch_adapter(known.spec.digest)
        return known


def _is_the_same(known: LoRARequest, request: LoRARequest) -> bool:
    return (known.lora_name, known.lora_path) == (request.lora_name, request.lora_path)


def _is_still(before: DirectoryStamp | None, now: DirectoryStamp | None) -> bool:
    """Return whether the files are unchanged or gone."""
    return now is None or not now.files or (now == before and before is not None and before.is_proof)
