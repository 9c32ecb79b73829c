"""The adapters of one worker by (name, version), as the controller asked for them.

Owns: what is known of each, and what the controller said that names stand for. Leaves to others: what an alias stands
for (adapters/aliases.py), tokenizers and templates (registered_tokenizers.py), gRPC (service.py).
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

_Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class _Read:
    """What lay at an adapter's place."""

    spec: AdapterSpec
    text: TokenizerFiles | None  # None: the base model's


class AdapterRegistry:
    """Thread-safe; no call waits for a file system. An adapter waits for what was asked before under its own name and
    version only."""

    def __init__(self, engine: Engine, of_start: Collection[str] = ()) -> None:
        """of_start: names that the worker loads whenever it starts."""
        self._engine = engine
        self._names = AdapterNames(of_start)
        # A version that is loaded in place of a pinned one has its pin from then on, and not one more.
        self._aliases: Aliases[_Key] = Aliases(engine, owner=lambda key: key[0])
        self._lock = threading.Lock()
        self._adapters: dict[_Key, worker_pb2.Adapter] = {}
        self._texts = RegisteredTokenizers(Path(engine.config.model))

    def all(self) -> list[worker_pb2.Adapter]:
        with self._lock:
            return list(self._adapters.values())

    def note(self, adapters: Iterable[worker_pb2.Adapter]) -> None:
        """What names stand for now; remembered for the controller."""
        with self._lock:
            self._names.note(adapters)

    def names(self) -> list[worker_pb2.Adapter]:
        """What names stand for, as it was noted."""
        with self._lock:
            return self._names.all()

    def register(self, request: worker_pb2.RegisterAdapterRequest) -> Future[worker_pb2.Adapter]:
        """Read and verify an adapter; one that is known by the same request is not read again.

        Fails with `AdapterRefusedError`, of reason `changed` for another digest than it must have,
        `AdapterUnavailableError` (its files cannot be read in time), and
        `AdapterConflictError` when no more adapters can be pinned.
        """
        key = request.name, request.version
        return self._aliases.in_turn(key, partial(self._read, request), partial(self._put, request), request.root)

    def text_files(self, digest: str) -> Future[dict[str, bytes] | None]:
        """Tokenizer and template of an adapter with this text_digest; see `RegisteredTokenizers.files`."""
        return self._texts.files(digest)

    def prefetch(self, adapter: worker_pb2.Adapter) -> None:
        """Bring it into the host cache, if there is room, before the first request names it."""
        self._engine.prefetch_adapter(adapter.digest)

    def unregister(self, name: str, version: int) -> Future[Future[FreedBytes] | None]:
        """Forget it, after what was asked before is done; what that frees, see `Aliases.remove`.

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
    """Whether an adapter is what is asked for. Without a digest another load under the same version is not: its answer
    was lost, and nobody knows of it."""
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
            f"The files of {request.name!r} have changed since it was loaded. Load it in place to serve what they are "
            "now.",
            reason="changed",
        )
