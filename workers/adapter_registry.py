"""The adapters of one worker by (name, version), as the controller asked for them.

Owns: what is known of each, and what the controller said that names stand for. Leaves to others: what an alias stands
for (adapters/aliases.py), gRPC (service.py).
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable
from concurrent.futures import Future
from pathlib import Path

from lorafleet.proto import worker_pb2
from lorafleet.workers.adapter_names import AdapterNames
from lorafleet.workers.adapters.aliases import Aliases
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.engine.registered import FreedBytes
from lorafleet.workers.errors import AdapterRefusedError, LoRAFleetError, ModelError
from lorafleet.workers.text.adapter_texts import AdapterTexts
from lorafleet.workers.text.files import files_digest

_Key = tuple[str, int]


class AdapterRegistry:
    """Thread-safe. `register`, `unregister` and `text_files` block while files are read."""

    def __init__(self, engine: Engine, of_start: Collection[str] = ()) -> None:
        """of_start: names that the worker loads whenever it starts."""
        self._engine = engine
        self._names = AdapterNames(of_start)
        self._aliases: Aliases[_Key] = Aliases(engine)
        self._lock = threading.Lock()
        self._adapters: dict[_Key, worker_pb2.Adapter] = {}
        self._directories: dict[_Key, Path] = {}
        self._text_lock = threading.Lock()  # another one, since building a tokenizer takes long
        self._texts = AdapterTexts(Path(engine.config.model), max_texts=4)

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

    def register(self, request: worker_pb2.RegisterAdapterRequest) -> worker_pb2.Adapter:
        """Read and verify an adapter; one that is known under this name and version is not read again.

        Raises `AdapterRefusedError`, with reason `changed` for another digest than it must have, and
        `AdapterConflictError` when no more adapters can be pinned.
        """
        key = request.name, request.version
        with self._lock:
            known = self._adapters.get(key)
        if known is not None:
            _check_digest(request, known.digest)
            return known
        spec = self._aliases.add(key, request.root, list(request.allowed_roots) or None).result()
        try:
            _check_digest(request, spec.digest)
            with self._text_lock:
                text = self._texts.of(spec.path, spec.folder.roots)
            if request.pin:
                self._engine.pin_adapter(spec.digest)
        except ModelError as error:
            self._aliases.remove(key)
            raise AdapterRefusedError(f"{spec.folder}: {error.message}", reason="bad_tokenizer") from error
        except LoRAFleetError:
            self._aliases.remove(key)
            raise
        adapter = worker_pb2.Adapter(
            name=request.name,
            digest=spec.digest,
            version=request.version,
            root=request.root,
            parent=request.parent,
            created=request.created,
            lora_rank=spec.lora_rank,
            text_digest="" if text is None else text.digest,
            vocab_size=spec.vocab_size,
            weight=request.weight if request.HasField("weight") else 1.0,
            pin=request.pin,
            not_composable=spec.not_composable,
            place=spec.folder.place,
            allowed_roots=request.allowed_roots,
        )
        with self._lock:
            self._adapters[key] = adapter
            self._directories[key] = spec.path
        return adapter

    def text_files(self, digest: str) -> dict[str, bytes] | None:
        """Tokenizer and template of an adapter with this text_digest; None: there is none, or its files changed."""
        with self._lock:
            directories = [
                self._directories[key] for key, known in self._adapters.items() if known.text_digest == digest
            ]
        for directory in directories:
            with self._text_lock:
                files = self._texts.files(directory)
            if files is not None and files_digest(files) == digest:
                return files
        return None

    def prefetch(self, adapter: worker_pb2.Adapter) -> None:
        """Bring it into the host cache, if there is room, before the first request names it."""
        self._engine.prefetch_adapter(adapter.digest)

    def unregister(self, name: str, version: int) -> Future[FreedBytes] | None:
        """Forget it; what that frees, see `Aliases.remove`. Raises `UnknownModelError`."""
        with self._lock:
            self._adapters.pop((name, version), None)
            self._directories.pop((name, version), None)
        return self._aliases.remove((name, version)).result()


def _check_digest(request: worker_pb2.RegisterAdapterRequest, digest: str) -> None:
    if request.digest and request.digest != digest:
        raise AdapterRefusedError(
            f"The files of {request.name!r} have changed since it was loaded. Load it in place to serve what they are "
            "now.",
            reason="changed",
        )
