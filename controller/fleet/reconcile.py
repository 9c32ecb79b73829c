"""Desired against observed, workers and their adapters: what to do next. Pure, tested as tables."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lorafleet.proto import worker_pb2

Key = tuple[str, int]  # name and version of an adapter


@dataclass(frozen=True, slots=True)
class Actions:
    """Worker names."""

    create: tuple[str, ...]
    remove: tuple[str, ...]


def reconcile(desired: Sequence[str], observed: Collection[str]) -> Actions:
    """Workers that are wanted and missing, in wanted order, and workers that exist unwanted, sorted."""
    return Actions(
        create=tuple(name for name in desired if name not in observed),
        remove=tuple(sorted(set(observed) - set(desired))),
    )


@dataclass(frozen=True, slots=True)
class AdapterActions:
    """Of one worker."""

    note: tuple[worker_pb2.Adapter, ...]  # it has not heard what these names stand for
    register: tuple[worker_pb2.Adapter, ...]
    unregister: tuple[Key, ...]  # no request can name these
    retire: tuple[worker_pb2.Adapter, ...]  # requests may still need these, on whichever worker


def reconcile_adapters(
    names: Mapping[str, worker_pb2.Adapter],
    needed: Iterable[worker_pb2.Adapter],
    registered: Mapping[Key, worker_pb2.Adapter],
    noted: Mapping[str, int],
    *,
    staging: Collection[Key],
    all_heard: bool,
) -> AdapterActions:
    """What makes a worker's adapters those of the fleet.

    names: what each stands for, unloaded ones included. needed: older versions that requests still use. registered: the
    worker's adapters. noted: versions that the worker knows to be the newest. staging: versions that a load is just
    bringing. all_heard: every worker has said what names stand for, so that a version which nobody has noted is left
    over from a load that failed; before that it may be the fleet's newest.
    """
    wanted = {(name, adapter.version): adapter for name, adapter in names.items() if not adapter.unloaded}
    wanted |= {(adapter.name, adapter.version): adapter for adapter in needed}
    unregister, retire = [], []
    for key, adapter in registered.items():
        if key in wanted:
            if adapter.digest != wanted[key].digest:  # read when its files had changed; what was noted counts
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
