"""Which of the requests that may start comes next, while one after another does.

Owns: that order over clients of many adapters, in little time for each start. Leaves to others: what a client's rank is
(clients.py), which adapters are ready (residency.py).

Every start lets its tenant's counter grow, and with it the rank of all its clients. So clients that are alone in
waiting for their adapter are ranked within their tenant, which has one key. Of an adapter for which several wait only
the first one counts, whoever that is then.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

from lorafleet.workers.engine.clients import Client, Clients, Rank
from lorafleet.workers.engine.ranking import Ranking

_Head = str | tuple[str | None]  # a tenant, or an adapter in a tuple


class StartOrder:
    """Of one step. Look at the `first`; when its request has started, say so."""

    def __init__(self, clients: Clients, adapters: Iterable[str | None], without: Set[str] = frozenset()) -> None:
        """adapters: that are ready; None is the base model. without: tenants that are left out."""
        self._clients = clients
        self._without = without
        self._alone: dict[str, Ranking[Client]] = {}  # by tenant
        self._heads: Ranking[_Head] = Ranking(self._rank)  # ranks only grow with a start
        for adapter in adapters:
            client = clients.first_beside(without, adapter)
            if client is None:
                continue
            if clients.num_clients_for(adapter) > 1:
                self._heads.push((adapter,))
            else:
                self._alone.setdefault(client.tenant, Ranking(clients.rank_in_tenant)).push(client)
        for tenant in self._alone:
            self._heads.push(tenant)

    def first(self) -> Client | None:
        """The client that is served next."""
        head = self._heads.first()
        return None if head is None else self._client(head)

    def started(self, client: Client) -> None:
        """A request of the first client does not wait any more."""
        alone = self._alone.get(client.tenant)
        if alone is not None and client in alone:
            if not client.waiting:
                alone.discard(client)
            if not alone:
                self._heads.discard(client.tenant)
        elif self._client((client.adapter,)) is None:
            self._heads.discard((client.adapter,))

    def _client(self, head: _Head) -> Client | None:
        if isinstance(head, str):
            return self._alone[head].first()
        return self._clients.first_beside(self._without, head[0])

    def _rank(self, head: _Head) -> Rank:
        client = self._client(head)
        assert client is not None
        return self._clients.rank(client)
