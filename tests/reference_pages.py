"""The tables of docs/reference/ that follow from the code. `make reference` writes them into their pages.

A page has a table between `<!-- generated: NAME -->` and `<!-- end -->`; the rest of it is written by hand.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prometheus_client.core import Metric

from lorafleet.controller.gateway.api.field_rule import ENDPOINTS, FieldRule, rule_of
from lorafleet.controller.gateway.api.known_fields import HARMLESS
from lorafleet.controller.gateway.api.schema import ASKS_NOTHING, StreamOptions
from lorafleet.controller.gateway.metrics.instruments import Metrics
from lorafleet.controller.gateway.metrics.page import Snapshot
from lorafleet.controller.gateway.metrics.vllm import VllmCollector
from lorafleet.controller.gateway.metrics.workers import FleetCollector
from lorafleet.workers.errors import ERRORS

PAGES = Path(__file__).parents[1] / "docs" / "reference"
_PLACE = re.compile(r"(<!-- generated: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def fields() -> str:
    """What becomes of each known field at each endpoint, and the values with which a refused one is accepted."""
    rules = [rule_of(kind) for kind in ENDPOINTS.values()]
    names = {*ASKS_NOTHING, *HARMLESS}.union(*(rule.names for rule in rules))
    rows = [
        (f"`{name}`", *(_fate(rule, name) for rule in rules), _values(rules, name))
        for name in sorted(names - rule_of(StreamOptions).known.keys())
    ]
    return _table(("field", *(f"`{path}`" for path in ENDPOINTS), "may be"), rows)


def _fate(rule: FieldRule, name: str) -> str:
    if name in rule.honoured:
        return "honoured"
    if name in rule.other_names:
        return f"as `{rule.other_names[name]}`"
    return "refused" if rule.is_refused(name) else "ignored"


def _values(rules: Sequence[FieldRule], name: str) -> str:
    refusing = [rule for rule in rules if rule.is_refused(name)]
    values = [value for rule in refusing[:1] for value in rule.known[name]]
    return ", ".join(f"`{json.dumps(value)}`" for value in values)


def error_codes() -> str:
    """A row for each of `ERRORS`."""
    rows = []
    for kind, status in ERRORS.items():
        seconds = "" if kind.retry_after_s is None else str(math.ceil(kind.retry_after_s))
        meaning = (inspect.getdoc(kind) or "").splitlines()[0]
        rows.append((f"`{status.code}`", str(status.http), status.openai_type, status.grpc, seconds, meaning))
    return _table(("code", "HTTP", "type", "gRPC", "Retry-After", "meaning"), rows)


def gateway_metrics() -> str:
    """Return the metrics that a gateway counts."""
    return _metrics(_counted().registry.collect())


def worker_metrics() -> str:
    """Return a gateway's metrics of the workers."""
    return _metrics(FleetCollector(list).collect())


def vllm_metrics() -> str:
    """Return the metrics exported under vLLM's names."""
    table: Any = SimpleNamespace(base_name="model", models={})
    return _metrics(VllmCollector(_counted(), lambda: Snapshot(table=table)).collect())


TABLES = {
    "fields": fields,
    "error codes": error_codes,
    "gateway metrics": gateway_metrics,
    "worker metrics": worker_metrics,
    "vllm metrics": vllm_metrics,
}


def filled(page: str) -> str:
    """A page's text with its tables as the code has them now."""
    return _PLACE.sub(lambda place: f"{place[1]}\n{TABLES[place[2]]()}\n{place[3]}", page)


def _counted() -> Metrics:
    """Instruments with a series each, from which their labels can be told."""
    metrics = Metrics()
    metrics.http_requests.labels("/health", "200").inc()
    model = metrics.model("model")
    model.finished(1.0, 1, 0)
    model.first_token(1.0)
    model.gap(1.0)
    return metrics


def _metrics(families: Iterable[Metric]) -> str:
    rows = []
    for family in families:
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = dict.fromkeys(getattr(family, "_labelnames", ()))
        labels |= dict.fromkeys(label for sample in family.samples for label in sample.labels if label != "le")
        rows.append((f"`{name}`", family.type, ", ".join(f"`{label}`" for label in labels), family.documentation))
    return _table(("metric", "type", "labels", "meaning"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    for file in sorted(PAGES.glob("*.md")):
        text = file.read_text()
        if (fresh := filled(text)) != text:
            file.write_text(fresh)
            print(f"wrote {file}", file=sys.stderr)
