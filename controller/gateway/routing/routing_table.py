"""The gateway's copy of the routing table: plain, immutable, indexed by name.

Owns: its shape, its conversion from the wire, the lookup of a model's name. Leaves to others: receiving it
(streams/controller_client.py), choosing a worker (router.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lorafleet.controller.gateway.routing.near_names import NearNames
from lorafleet.proto import controller_pb2, worker_pb2
from lorafleet.workers.errors import UnknownModelError, quoted


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """One name that a request's `model` may have."""

    name: str
    digest: str  # the adapter's; empty for the base model
    version: int
    root: str
    parent: str | None  # None for the base model
    created: int  # unix seconds
    text_digest: str = ""  # its own tokenizer's and template's; empty: the base model's
    vocab_size: int = 0  # number of token ids its requests may use
    weight: float = 1.0  # share of service among a tenant's adapters
    not_composable: str = ""  # why it cannot be applied with a weight or with others
    composition: tuple[tuple[ModelEntry, float], ...] = ()  # a composition's adapters and their weights

    @property
    def parts(self) -> tuple[tuple[str, float], ...]:
        """Return (digest, weight) of each applied adapter, ordered by digest."""
        if self.composition:
            return tuple(sorted((entry.digest, weight) for entry, weight in self.composition))
        return ((self.digest, 1.0),) if self.digest else ()

    @property
    def adapters(self) -> tuple[ModelEntry, ...]:
        """Return the adapters that must be in slots."""
        return tuple(entry for entry, _ in self.composition) or ((self,) if self.digest else ())


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One worker's identity, address and limits."""

    worker_id: str
    generation: int
    address: str
    max_num_seqs: int
    max_loras: int  # 0: LoRA is off
    draining: bool
    num_ranks: int = 1
    lacking: Mapping[str, str] = field(default_factory=dict)  # digests it lacks → reason code; empty while being loaded

    @property
    def identity(self) -> tuple[str, int, str]:
        return self.worker_id, self.generation, self.address


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingTable:
    """One version of the controller's table. models: in the order of GET /v1/models, the base model's names first."""

    incarnation: str
    version: int
    tokenizer_digest: str
    max_model_len: int
    vocab_size: int
    models: Mapping[str, ModelEntry]
    workers: tuple[Endpoint, ...]
    _near: NearNames = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_near", NearNames(self.models))

    @classmethod
    def from_wire(cls, table: controller_pb2.RoutingTable) -> RoutingTable:
        """Convert a table. Of adapters with the same name the highest version counts; names of the base model win."""
        base = table.base
        models = {
            name: ModelEntry(
                name=name,
                digest="",
                version=0,
                root=base.root,
                parent=None,
                created=base.created,
                vocab_size=base.vocab_size,
            )
            for name in base.names
        }
        num_base = len(models)
        for adapter in sorted(table.adapters, key=lambda entry: entry.version):
            if not adapter.digest or adapter.name in base.names:
                continue  # without a digest the base model would answer, and the base model's name would be hidden
            models[adapter.name] = ModelEntry(
                name=adapter.name,
                digest=adapter.digest,
                version=adapter.version,
                root=adapter.root,
                parent=adapter.parent,
                created=adapter.created,
                text_digest=adapter.text_digest,
                vocab_size=adapter.vocab_size or base.vocab_size,
                weight=adapter.weight if adapter.HasField("weight") else 1.0,
                not_composable=adapter.not_composable,
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
                    worker_id=worker.worker_id,
                    generation=worker.generation,
                    address=worker.address,
                    max_num_seqs=max(worker.max_num_seqs, 1),
                    max_loras=worker.max_loras,
                    draining=worker.state == worker_pb2.WORKER_DRAINING,
                    num_ranks=max(worker.num_ranks, 1),
                    lacking={lacking.digest: lacking.reason for lacking in worker.lacking},
                )
                for worker in table.workers
            ),
        )

    @property
    def base_name(self) -> str:
        """Return the base model's canonical name."""
        return next(iter(self.models), "")

    @property
    def base(self) -> ModelEntry:
        """Return the base model's entry."""
        return self.models[self.base_name]

    def unavailable(self, digest: str) -> str | None:
        """Return the code why no worker has an adapter; None if one has it or loads it, or there are no workers."""
        reasons = [worker.lacking.get(digest) for worker in self.workers]
        return reasons[0] if all(reasons) and reasons else None

    def resolve(self, name: str) -> ModelEntry:
        """Return the model called `name`. Raises UnknownModelError, which suggests similar names."""
        entry = self.models.get(name)
        if entry is not None:
            return entry
        near = self._near.of(name)
        hint = f" Did you mean {' or '.join(map(quoted, near))}?" if near else ""
        raise UnknownModelError(
            f"There is no model {quoted(name)}.{hint} GET /v1/models lists the base model and its adapters.",
            param="model",
        )
