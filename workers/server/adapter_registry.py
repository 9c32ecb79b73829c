"""The adapters of one worker by (name, version), as the controller registered them.

Owns: the data of each, and the meaning of names as the controller reported it. Leaves to others: the content of an
alias (engine/aliases.py), tokenizers and templates (registered_tokenizers.py), gRPC (service.py).
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lorafleet.proto import worker_pb2
from lorafleet.workers.adapters.format import AdapterSpec
from lorafleet.workers.engine.aliases import Aliases
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.engine.registered import FreedBytes
from lorafleet.workers.errors import AdapterRefusedError, ModelError
from lorafleet.workers.server.adapter_names import AdapterNames
from lorafleet.workers.server.registered_tokenizers import RegisteredTokenizers, TokenizerFiles
from lorafleet.workers.text.tokenizer import Tokenizer

_Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class _Read:
    """The content of an adapter's files."""

    spec: AdapterSpec
    text: TokenizerFiles | None  # None: the base model's


class AdapterRegistry:
    """Thread-safe; no call waits for a file system. Calls wait only for earlier ones on their name and version."""

    def __init__(self, engine: Engine, of_start: Collection[str] = ()) -> None:
        """of_start: names that the worker loads at every start."""
        self._engine = engine
        self._names = AdapterNames(of_start)
        # A version loaded in place of a pinned one takes over its pin; it does not add one.
        self._aliases: Aliases[_Key] = Aliases(engine, owner=lambda key: key[0])
        self._lock = threading.Lock()
        self._adapters: dict[_Key, worker_pb2.Adapter] = {}
        self._texts = RegisteredTokenizers(Path(engine.config.model))

    def all(self) -> list[worker_pb2.Adapter]:
        with self._lock:
            return list(self._adapters.values())

    def note(self, adapters: Iterable[worker_pb2.Adapter]) -> None:
        """Record the current meaning of names, for the controller."""
        with self._lock:
            self._names.note(adapters)

    def names(self) -> list[worker_pb2.Adapter]:
        """Return the meaning of names as recorded by `note`."""
        with self._lock:
            return self._names.all()

    def register(self, request: worker_pb2.RegisterAdapterRequest) -> Future[worker_pb2.Adapter]:
        """Read and verify an adapter. A repeated request for a registered one does not read it again.

        Fails with `AdapterRefusedError` (reason `changed` if the digest differs from the requested one),
        `AdapterUnavailableError` if its files cannot be read in time, and `AdapterConflictError` if no more adapters
        can be pinned.
        """
        key = request.name, request.version
        return self._aliases.in_turn(key, partial(self._read, request), partial(self._put, request), request.root)

    def text_files(self, digest: str) -> Future[dict[str, bytes] | None]:
        """Return the tokenizer and template files with this text_digest; see `RegisteredTokenizers.files`."""
        return self._texts.files(digest)

    def tokenizer(self, digest: str) -> Tokenizer | None:
        """Return the tokenizer of a text_digest; None if no adapter has it any more. Slow. Raises `ModelError`."""
        files = self.text_files(digest).result()
        return None if files is None else Tokenizer.from_files(files)

    def prefetch(self, adapter: worker_pb2.Adapter) -> None:
        """Load it into the host cache, if there is room, before its first request."""
        self._engine.prefetch_adapter(adapter.digest)

    def unregister(self, name: str, version: int) -> Future[Future[FreedBytes] | None]:
        """Unregister it after all earlier calls for it; for the result see `Aliases.remove`.

        Fails with `UnknownModelError`.
        """
        key = name, version
        return self._aliases.in_turn(key, lambda: None, lambda _: self._remove(key), "")

    def close(self) -> None:
        self._aliases.close()
        self._texts.close()

    def _read(self, request: worker_pb2.RegisterAdapterRequest) -> worker_pb2.Adapter | _Read:
        with self._lock:
            known = self._adapters.get((request.name, request.version))
        if known is not None and _is_known(known, request):
            return known
        spec = self._engine.read_adapter(request.root, roots=list(request.allowed_roots) or None)
        try:
            text = self._texts.read(spec.path, spec.folder.roots)
            _check_digests(request, spec.digest, "" if text is None else text.digest)
        except ModelError as error:
            raise AdapterRefusedError(f"{spec.folder}: {error.message}", reason="bad_tokenizer") from error
        return _Read(spec, text)

    def _put(self, request: worker_pb2.RegisterAdapterRequest, read: worker_pb2.Adapter | _Read) -> worker_pb2.Adapter:
        if isinstance(read, worker_pb2.Adapter):
            return read
        key, spec = (request.name, request.version), read.spec
        self._aliases.put(key, spec, pin=request.pin)
        adapter = worker_pb2.Adapter(
            name=request.name,
            digest=spec.digest,
            version=request.version,
            root=request.root,
            parent=request.parent,
            created=request.created,
            lora_rank=spec.lora_rank,
            text_digest="" if read.text is None else read.text.digest,
            vocab_size=spec.vocab_size,
            weight=_weight_of(request),
            pin=request.pin,
            not_composable=spec.not_composable,
            place=spec.folder.place,
            allowed_roots=request.allowed_roots,
        )
        with self._lock:
            before = self._adapters.get(key)
            self._adapters[key] = adapter
            if read.text is not None:
                self._texts.hold(read.text)
            if before is not None:
                self._texts.release(before.text_digest)
        return adapter

    def _remove(self, key: _Key) -> Future[FreedBytes] | None:
        with self._lock:
            adapter = self._adapters.pop(key, None)
            if adapter is not None:
                self._texts.release(adapter.text_digest)
        return self._aliases.drop(key)


def _is_known(known: worker_pb2.Adapter, request: worker_pb2.RegisterAdapterRequest) -> bool:
    """Return whether `known` answers the request.

    Without a digest the request must equal the one that loaded it: the answer to any other load was lost, so it is
    unused.
    """
    if request.digest:
        return (known.digest, known.text_digest) == (request.digest, request.text_digest)
    fields = ("root", "parent", "created", "pin")
    return known.weight == _weight_of(request) and all(
        getattr(known, field) == getattr(request, field) for field in fields
    )


def _weight_of(request: worker_pb2.RegisterAdapterRequest) -> float:
    return request.weight if request.HasField("weight") else 1.0


def _check_digests(request: worker_pb2.RegisterAdapterRequest, digest: str, text_digest: str) -> None:
    if request.digest and (request.digest, request.text_digest) != (digest, text_digest):
        raise AdapterRefusedError(
            f"The files of {request.name!r} have changed since it was loaded. Load it in place to serve the new "
            "version.",
            reason="changed",
        )
