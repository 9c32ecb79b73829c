"""The routing table as the gateway holds it: plain, immutable, indexed by name.

Owns: its shape, reading it from the wire, resolving a model's name. Leaves to others: receiving it (routes.py),
choosing a worker (router.py).
"""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lorafleet.proto import controller_pb2, worker_pb2
from lorafleet.workers.errors import UnknownModelError

NUM_NEAR_MATCHES = 3
_NUM_COMPARED = 64  # names that difflib looks at; it takes tens of microseconds for each


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One name that `model` may have."""

    name: str
    digest: str  # of the adapter; empty for the base model
    version: int
    root: str
    parent: str | None  # None for the base model
    created: int  # unix seconds
    text_digest: str = ""  # of its own tokenizer and template; empty: the base model's
    vocab_size: int = 0  # token ids that its requests may hold
    weight: float = 1.0  # share of service among a tenant's adapters
    not_composable: str = ""  # why it is not applied with a weight or with others
    composition: tuple[tuple[ModelEntry, float], ...] = ()  # of a composition: its adapters and their weights

    @property
    def parts(self) -> tuple[tuple[str, float], ...]:
        """(digest, weight) of all that is applied, in the order of digests."""
        if self.composition:
            return tuple(sorted((entry.digest, weight) for entry, weight in self.composition))
        return ((self.digest, 1.0),) if self.digest else ()

    @property
    def adapters(self) -> tuple[ModelEntry, ...]:
        """All that must be in slots."""
        return tuple(entry for entry, _ in self.composition) or ((self,) if self.digest else ())


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One worker's identity and address. Why it lacks an adapter is a code; empty while it is being loaded."""

    worker_id: str
    generation: int
    address: str
    max_num_seqs: int
    max_loras: int  # 0: LoRA is off
    draining: bool
    num_ranks: int = 1
    lacking: Mapping[str, str] = field(default_factory=dict)  # digests of adapters that it has not → why

    @property
    def identity(self) -> tuple[str, int, str]:
        return self.worker_id, self.generation, self.address


@dataclass(frozen=True, slots=True)
class RoutingTable:
    """One version of the controller's table. models: in the order of /v1/models, the base model's names first."""

    incarnation: str
    version: int
    tokenizer_digest: str
    max_model_len: int
    vocab_size: int
    models: Mapping[str, ModelEntry]
    workers: tuple[Endpoint, ...]

    @classmethod
    def from_wire(cls, table: controller_pb2.RoutingTable) -> RoutingTable:
        """Of adapters with one name the highest version counts; a base model's name is never an adapter's."""
        base = table.base
        models = {
            name: ModelEntry(name, "", 0, base.root, None, base.created, vocab_size=base.vocab_size)
            for name in base.names
        }
        num_base = len(models)
        for adapter in sorted(table.adapters, key=lambda entry: entry.version):
            if not adapter.digest or adapter.name in base.names:
                continue  # the first would be answered by the base model, the second would hide it
            models[adapter.name] = ModelEntry(
                adapter.name,
                adapter.digest,
                adapter.version,
                adapter.root,
                adapter.parent,
                adapter.created,
                adapter.text_digest,
                adapter.vocab_size or base.vocab_size,
                adapter.weight or 1.0,
                adapter.not_composable,
            )
        adapters = sorted(list(models.values())[num_base:], key=lambda entry: entry.name)
        return cls(
            incarnation=table.incarnation,
            version=table.version,
            tokenizer_digest=base.tokenizer_digest,
            max_model_len=base.max_model_len,
            vocab_size=base.vocab_size,
            models={entry.name: entry for entry in [*list(models.values())[:num_base], *adapters]},
            workers=tuple(
                Endpoint(
                    worker.worker_id,
                    worker.generation,
                    worker.address,
                    max(worker.max_num_seqs, 1),
                    worker.max_loras,
                    worker.state == worker_pb2.WORKER_DRAINING,
                    max(worker.num_ranks, 1),
                    {lacking.digest: lacking.reason for lacking in worker.lacking},
                )
                for worker in table.workers
            ),
        )

    @property
    def base_name(self) -> str:
        """The base model's canonical name."""
        return next(iter(self.models), "")

    def unavailable(self, digest: str) -> str | None:
        """Why no worker has an adapter, a code; None where one has it or is loading it, or none is there."""
        reasons = [worker.lacking.get(digest) for worker in self.workers]
        return reasons[0] if all(reasons) and reasons else None

    def resolve(self, name: str) -> ModelEntry:
        """The model called `name`. Raises UnknownModelError with near matches."""
        entry = self.models.get(name)
        if entry is not None:
            return entry
        near = near_matches(name, self.models)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        shown = name if len(name) <= 128 else name[:128] + "..."
        raise UnknownModelError(
            f"There is no model {shown!r}.{hint} GET /v1/models lists the base model and its adapters.", param="model"
        )


def near_matches(name: str, names: Iterable[str]) -> list[str]:
    """At most three of `names` that look like `name`, the likest first.

    Names are first ranked by the pairs of letters that they share, since difflib is too slow for thousands.
    """
    wanted = name[:256].lower()
    pairs = _pairs(wanted)

    def overlap(candidate: str) -> float:
        own = _pairs(candidate.lower())
        return len(own & pairs) / max(len(own | pairs), 1)

    shortlist = {candidate.lower(): candidate for candidate in heapq.nlargest(_NUM_COMPARED, names, key=overlap)}
    return [shortlist[match] for match in difflib.get_close_matches(wanted, shortlist, NUM_NEAR_MATCHES, cutoff=0.5)]


def _pairs(text: str) -> set[str]:
    return {text[start : start + 2] for start in range(max(len(text) - 1, 1))}
