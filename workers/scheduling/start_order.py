"""Which of the requests that may start comes next, while one after another does.

Owns: that order over flows of many adapters, in little time for each start. Leaves to others: what a flow's rank is
(flows.py), which adapters are ready (residency.py).

Every start lets its tenant's counter grow, and with it the rank of all its flows. So flows that are alone in
waiting for their adapter are ranked within their tenant, which has one key. Of an adapter for which several wait only
the first one counts, whoever that is then.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

from lorafleet.workers.scheduling.flows import Flow, Flows, Rank
from lorafleet.workers.scheduling.ranking import Ranking

_Head = str | tuple[str | None]  # a tenant, or an adapter in a tuple


class StartOrder:
    """Of one step. Look at the `first`; when its request has started, say so."""

    def __init__(self, flows: Flows, adapters: Iterable[str | None], without: Set[str] = frozenset()) -> None:
        """adapters: that are ready; None is the base model. without: tenants that are left out."""
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
        """The flow that is served next."""
        head = self._heads.first()
        return None if head is None else self._flow(head)

    def started(self, flow: Flow) -> None:
        """A request of the first flow does not wait any more."""
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
