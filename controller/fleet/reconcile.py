"""Compares desired with observed workers and adapters, and returns what to do next. Pure, tested as tables."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lorafleet.proto import worker_pb2

Key = tuple[str, int]  # name and version of an adapter


@dataclass(frozen=True, slots=True)
class Actions:
    """Names of workers to create and to remove."""

    create: tuple[str, ...]
    remove: tuple[str, ...]


def reconcile(desired: Sequence[str], observed: Collection[str]) -> Actions:
    """Return the missing workers, in desired order, and the unwanted ones, sorted."""
    return Actions(
        create=tuple(name for name in desired if name not in observed),
        remove=tuple(sorted(set(observed) - set(desired))),
    )


@dataclass(frozen=True, slots=True)
class AdapterActions:
    """The adapter calls one worker needs."""

    note: tuple[worker_pb2.Adapter, ...]  # the worker does not know yet that these names stand for these versions
    register: tuple[worker_pb2.Adapter, ...]
    unregister: tuple[Key, ...]  # no request can use these
    retire: tuple[worker_pb2.Adapter, ...]  # requests on some worker may still need these


def reconcile_adapters(
    names: Mapping[str, worker_pb2.Adapter],
    needed: Iterable[worker_pb2.Adapter],
    registered: Mapping[Key, worker_pb2.Adapter],
    noted: Mapping[str, int],
    *,
    staging: Collection[Key],
    all_heard: bool,
) -> AdapterActions:
    """Return the calls that make a worker's adapters those of the fleet.

    names: the adapter each name stands for, unloaded ones included. needed: older versions that requests still use.
    registered: the worker's adapters. noted: the newest version of each name the worker knows. staging: versions that a
    load in progress is reading. all_heard: every worker has told its names, so a version that none has noted is left
    over from a failed load; before that it may be the fleet's newest.
    """
    wanted = {(name, adapter.version): adapter for name, adapter in names.items() if not adapter.unloaded}
    wanted |= {(adapter.name, adapter.version): adapter for adapter in needed}
    unregister, retire = [], []
    for key, adapter in registered.items():
        if key in wanted:
            if adapter.digest != wanted[key].digest:  # its files had changed when it was read; the noted digest counts
                unregister.append(key)
        elif key not in staging:
            name, version = key
            newest = names.get(name)
            if newest is not None and newest.version >= version:
                retire.append(adapter)
            elif all_heard:
                unregister.append(key)
    return AdapterActions(
        note=tuple(adapter for name, adapter in names.items() if noted.get(name, 0) < adapter.version),
        register=tuple(adapter for key, adapter in wanted.items() if key not in registered),
        unregister=tuple(unregister),
        retire=tuple(retire),
    )
