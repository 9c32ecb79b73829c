"""Tenants: the sender of a request, by its API key, and its share of the workers.

Owns: the file of tenants, the tenant of each key. Leaves to others: the check of a request's key (api/auth.py),
sharing (workers/scheduling/fairness.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from lorafleet.controller.gateway.api_keys import check_keys
from lorafleet.workers.errors import ConfigError, InvalidRequestError
from lorafleet.workers.scheduling.request import MAX_PRIORITY, MAX_TENANT_CHARS, MAX_WEIGHT, MIN_WEIGHT


@dataclass(frozen=True, slots=True)
class Tenant:
    """The sender of a request. Without API keys, all requests belong to the tenant without a name."""

    name: str = ""
    weight: float = 1.0  # share of service relative to other tenants
    priority: int = 0  # lower is served earlier, whatever the shares
    is_admin: bool = False  # may load and unload adapters

    def priority_of(self, asked: int | None) -> int:
        """Return a request's priority: `asked` plus the tenant's. Raises InvalidRequestError.

        A tenant's request may rank after others, but not ahead of other tenants'.
        """
        if self.name and asked is not None and asked < 0:
            raise InvalidRequestError(
                f"priority is {asked}; with an API key it must be 0 or more (0 is served first).", param="priority"
            )
        priority = self.priority + (asked or 0)
        if not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
            raise InvalidRequestError(
                f"priority is {asked}; with the tenant's own it must be between {-MAX_PRIORITY} and {MAX_PRIORITY}.",
                param="priority",
            )
        return priority


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    api_keys: list[str]
    weight: float = 1.0
    priority: int = 0


def read_tenants(path: Path) -> dict[str, Tenant]:
    """Read API key → tenant from a JSON file: `[{"name": ..., "api_keys": [...], "weight": 1.0, "priority": 0}, ...]`.

    Raises ConfigError, whose text contains no key.
    """
    try:
        entries = msgspec.json.decode(path.read_bytes(), type=list[_Entry])
    except OSError as error:
        raise ConfigError(f"--tenants {path} cannot be read: {error.strerror}.") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        # A decode error of msgspec contains types and places, never values.
        said = str(error) if isinstance(error, msgspec.DecodeError) else "it is not UTF-8"
        raise ConfigError(f"--tenants {path}: {said.rstrip('.')}.") from None
    tenants: dict[str, Tenant] = {}
    names: set[str] = set()
    for number, entry in enumerate(entries):
        where = f"--tenants {path}: tenant {number}"
        if not 0 < len(entry.name) <= MAX_TENANT_CHARS:
            raise ConfigError(f"{where} has a name of {len(entry.name)} characters; give 1 to {MAX_TENANT_CHARS}.")
        if entry.name in names:
            raise ConfigError(f"{where}: the name {entry.name!r} is given twice.")
        names.add(entry.name)
        if not MIN_WEIGHT <= entry.weight <= MAX_WEIGHT:
            raise ConfigError(f"{where}: weight is {entry.weight}; it must be {MIN_WEIGHT:g} to {MAX_WEIGHT:g}.")
        if not -MAX_PRIORITY <= entry.priority <= MAX_PRIORITY:
            raise ConfigError(f"{where}: priority is {entry.priority}; it must be {-MAX_PRIORITY} to {MAX_PRIORITY}.")
        if not entry.api_keys:
            raise ConfigError(f"{where} has no api_keys, so no request could be its own.")
        check_keys(where, entry.api_keys)
        for key in entry.api_keys:
            if key in tenants:
                raise ConfigError(f"{where} repeats an earlier API key.")
            tenants[key] = Tenant(entry.name, entry.weight, entry.priority)
    if not tenants:
        raise ConfigError(f"--tenants {path} names no tenant.")
    return tenants


def tenants_of(
    api_keys: Sequence[str], tenants: Mapping[str, Tenant], admin_api_keys: Sequence[str] = ()
) -> dict[str, Tenant]:
    """Return API key → tenant: each key of --api-key and of --admin-api-key is a tenant of its own, unless `tenants`
    has it. Without --admin-api-key the first of all keys is the administrator's. Raises ConfigError.
    """
    if not tenants.keys().isdisjoint(api_keys):
        raise ConfigError("A key of --api-key is also in the file of --tenants. Leave it out of one of them.")
    known = {key: Tenant(_name_of(key)) for key in api_keys} | dict(tenants)
    for key in admin_api_keys or list(known)[:1]:
        known[key] = replace(known.get(key, Tenant(_name_of(key))), is_admin=True)
    return known


def _name_of(key: str) -> str:
    return f"key-{hashlib.sha256(key.encode(errors='surrogateescape')).hexdigest()[:8]}"
