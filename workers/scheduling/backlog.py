"""Requests that the engine has accepted but not yet given to the scheduler.

Owns: their order: first come, first served within a tenant, and tenants in turn, so that none waits for another's
burst.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from lorafleet.workers.scheduling.request import GenerateRequest


class Backlog:
    """The accepted requests. Used by the stepping thread only."""

    def __init__(self) -> None:
        self._tenants: OrderedDict[str, dict[str, GenerateRequest]] = OrderedDict()  # the tenant served last is last
        self._tenant_of: dict[str, str] = {}  # by request id

    def __len__(self) -> int:
        return len(self._tenant_of)

    def __iter__(self) -> Iterator[str]:
        """Iterate over request ids, in no particular order."""
        return iter(self._tenant_of)

    def add(self, request: GenerateRequest) -> None:
        self._tenants.setdefault(request.tenant, {})[request.request_id] = request
        self._tenant_of[request.request_id] = request.tenant

    def take(self) -> GenerateRequest | None:
        """Remove and return the next request."""
        if not self._tenants:
            return None
        tenant, requests = next(iter(self._tenants.items()))
        request = requests[next(iter(requests))]
        self._tenants.move_to_end(tenant)
        self.discard(request.request_id)
        return request

    def discard(self, request_id: str) -> bool:
        """Forget a request. Return whether it was here."""
        tenant = self._tenant_of.pop(request_id, None)
        if tenant is None:
            return False
        requests = self._tenants[tenant]
        del requests[request_id]
        if not requests:
            del self._tenants[tenant]
        return True
