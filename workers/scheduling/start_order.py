"""The order in which waiting requests start within a step.

Owns: that order over flows of many adapters, cheaply for each start. Leaves to others: a flow's rank (flows.py), the
ready adapters (residency.py).

Every start increases its tenant's counter, and thereby the rank of all its flows. So a flow that is the only one
waiting for its adapter is ranked within its tenant, which has one key. Of an adapter with several waiting flows, only
the current first one counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

from lorafleet.workers.scheduling.flows import Flow, Flows, Rank
from lorafleet.workers.scheduling.ranking import Ranking

_Head = str | tuple[str | None]  # a tenant, or an adapter in a tuple


class StartOrder:
    """The start order of one step. Start a request of `first`, then call `started`."""

    def __init__(self, flows: Flows, adapters: Iterable[str | None], without: Set[str] = frozenset()) -> None:
        """adapters: those that are ready; None is the base model. without: tenants to leave out."""
        self._flows = flows
        self._without = without
        self._alone: dict[str, Ranking[Flow]] = {}  # by tenant
        self._heads: Ranking[_Head] = Ranking(self._rank)  # ranks only grow with a start
        for adapter in adapters:
            flow = flows.first_beside(without, adapter)
            if flow is None:
                continue
            if flows.num_flows_for(adapter) > 1:
                self._heads.push((adapter,))
            else:
                self._alone.setdefault(flow.tenant, Ranking(flows.rank_in_tenant)).push(flow)
        for tenant in self._alone:
            self._heads.push(tenant)

    def first(self) -> Flow | None:
        """Return the flow that is served next."""
        head = self._heads.first()
        return None if head is None else self._flow(head)

    def started(self, flow: Flow) -> None:
        """Record that a request of the first flow has started."""
        alone = self._alone.get(flow.tenant)
        if alone is not None and flow in alone:
            if not flow.waiting:
                alone.discard(flow)
            if not alone:
                self._heads.discard(flow.tenant)
        elif self._flow((flow.adapter,)) is None:
            self._heads.discard((flow.adapter,))

    def _flow(self, head: _Head) -> Flow | None:
        if isinstance(head, str):
            return self._alone[head].first()
        return self._flows.first_beside(self._without, head[0])

    def _rank(self, head: _Head) -> Rank:
        flow = self._flow(head)
        assert flow is not None
        return self._flows.rank(flow)
