"""Prometheus rules and the dashboard read only series that a gateway exports, in queries that can be right."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from promql import QueryError, read

from lorafleet.controller.commands.command_table import make_parser
from lorafleet.controller.gateway.metrics.instruments import Metrics
from lorafleet.controller.gateway.metrics.page import Snapshot
from lorafleet.controller.gateway.metrics.vllm import VllmCollector
from lorafleet.controller.gateway.metrics.workers import FleetCollector
from lorafleet.controller.gateway.routing.routing_table import RoutingTable
from lorafleet.controller.gateway.routing.worker_view import Tier, WorkerView
from lorafleet.proto import controller_pb2
from lorafleet.workers.errors import ERRORS

FOLDER = Path(__file__).parents[2] / "deploy" / "monitoring"
GROUPS = yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = [rule for rule in RULES if "alert" in rule]
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS = [(panel, target) for panel in PANELS for target in panel["targets"]]

OF_ALL_WORKERS = ("lorafleet_worker_", "vllm:num_requests_", "vllm:kv_cache_usage_perc", "vllm:cache_config_info")
"""What every gateway exports of the same workers."""
TARGET_LABELS = ("job", "instance")
CLOSED_LABELS = ("code", "finish_reason", "finished_reason")
VLLM_NAMES = {"lorafleet_cached_prompt_tokens_total": "vllm:prefix_cache_hits_total"}
"""Of series with another name there; those that have the same differ in the prefix."""


class Gateway:
    """The registry of a gateway, without the gateway."""

    def __init__(self) -> None:
        self.views: list[WorkerView] = []
        self.waiting: list[str] = []
        wire = controller_pb2.RoutingTable(base=controller_pb2.BaseModel(names=["base"]))
        for name in ("sql", "pirate", "json"):
            wire.adapters.add(name=name, digest=f"d-{name}", version=1)
        table = RoutingTable.from_wire(wire)
        self.metrics = Metrics()
        registry = self.metrics.registry
        registry.register(FleetCollector(lambda: self.views))
        registry.register(VllmCollector(self.metrics, lambda: Snapshot(self.views, table, self.waiting)))

    def samples(self, name: str) -> list[dict[str, str]]:
        """Return the labels of each series with this name."""
        return [
            sample.labels
            for family in self.metrics.registry.collect()
            for sample in family.samples
            if sample.name == name
        ]


def view(worker_id: str, **tiers: Tier) -> WorkerView:
    digests = {f"d-{name}": tier for name, tier in tiers.items()}
    return WorkerView(worker_id, True, False, 8, 2, num_pages=100, num_free_pages=50, tiers=digests)


def busy_gateway() -> Gateway:
    """Return a registry in which every counter and gauge has a value."""
    gateway = Gateway()
    gateway.views = [view("w-1", sql=Tier.DEVICE), view("w-2", json=Tier.HOST)]
    gateway.waiting = ["pirate"]
    model = gateway.metrics.model("sql")
    model.first_token(0.1)
    model.gap(0.1)
    model.tokens(3)
    model.resumed()
    model.ended("stop")
    model.finished(1.0, 5, 2)
    gateway.metrics.http_requests.labels("/v1/completions", "200").inc()
    return gateway


def exported() -> dict[str, set[str]]:
    """Return the labels of each series as Prometheus stores them: the target's, and the gateway's own."""
    found: dict[str, set[str]] = {"up": set(TARGET_LABELS)}
    for family in busy_gateway().metrics.registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, set(TARGET_LABELS)).update(sample.labels)
    return found


EXPORTED = exported()


def recorded() -> dict[str, set[str]]:
    """Return the exported and recorded series; a record is known to the rules after it."""
    series = dict(EXPORTED)
    for rule in RULES:
        if "record" in rule:
            series[rule["record"]] = set(read(rule["expr"], series).labels or ())
    return series


RECORDED = recorded()


def panel_query(target: dict[str, Any]) -> str:
    """Return its query with Grafana's interval filled in; variables inside strings are label values."""
    return str(target["expr"]).replace("$__rate_interval", "5m")


QUERIES = {rule.get("alert") or rule["record"]: (rule["expr"], RECORDED) for rule in RULES} | {
    f"panel {panel['id']}{target['refId']}": (panel_query(target), EXPORTED) for panel, target in TARGETS
}
"""(query, series that it may read) of every rule and every target of the dashboard, by what it is for."""
each_query = pytest.mark.parametrize(("query", "series"), QUERIES.values(), ids=QUERIES.keys())


@each_query
def test_a_query_reads_what_a_gateway_exports_by_labels_that_it_has(query: str, series: dict[str, set[str]]) -> None:
    assert read(query, series).selectors


@each_query
def test_a_query_has_vllms_name_where_there_is_one(query: str, series: dict[str, set[str]]) -> None:
    for selector in read(query, series).selectors:
        same = VLLM_NAMES.get(selector.name, selector.name.replace("lorafleet_", "vllm:", 1))
        assert same == selector.name or same not in EXPORTED


def test_vllms_other_names_are_exported() -> None:
    assert set(VLLM_NAMES) | set(VLLM_NAMES.values()) <= set(EXPORTED)


@each_query
def test_no_worker_is_counted_once_for_each_gateway(query: str, series: dict[str, set[str]]) -> None:
    for selector in read(query, series).selectors:
        if selector.name.startswith(OF_ALL_WORKERS):
            assert selector.aggregation in ("max", "min"), selector.name


@each_query
def test_a_query_selects_values_that_there_are(query: str, series: dict[str, set[str]]) -> None:
    gateway = busy_gateway()
    for selector in read(query, series).selectors:
        for label, operator, value in selector.matchers:
            if label in CLOSED_LABELS:
                assert operator in ("=", "=~")
                assert set(value.split("|")) <= {labels[label] for labels in gateway.samples(selector.name)}


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("lorafleet_worker_redy", "no series lorafleet_worker_redy"),
        ("rate(lorafleet_generation_tokens[5m])", "no series"),
        ("sum(rate(vllm:time_to_first_token_seconds_buckets[5m])) / 2", "no series"),
        ("job:lorafleet_workers:sum == 0", "no series"),
        ("absent(lorafleet_requests)", "no series"),
        ('lorafleet_worker_ready{instance="a"} and on (job) lorafleet_nothing', "no series"),
        ('lorafleet_worker_ready{name="a"}', "no label name"),
        ("sum by (job, model) (vllm:generation_tokens_total)", "by .'model'."),
        ("sum(vllm:generation_tokens_total) by (model)", "by .'model'."),
        ("sum by (worker) (max by (job) (lorafleet_worker_ready))", "by .'worker'."),
        ("max by (job) (lorafleet_worker_ready) == max by (worker) (lorafleet_worker_ready)", "never matches"),
        ("lorafleet_worker_ready unless on (model) lorafleet_worker_suspect", "not both sides"),
        ("histogram_quantile(0.9, sum by (job) (vllm:time_to_first_token_seconds_bucket))", "without le"),
        ("rates(lorafleet_choices_total[5m])", "no function rates"),
        ("sum(lorafleet_worker_ready", "breaks off|should be"),
        ("lorafleet_worker_ready lorafleet_worker_suspect", "should be"),
        ("lorafleet_worker_ready ? 1", "no PromQL"),
    ],
)
def test_a_query_that_cannot_be_right_is_found(query: str, why: str) -> None:
    with pytest.raises(QueryError, match=why):
        read(query, EXPORTED)


def test_a_querys_labels_are_those_of_its_answer() -> None:
    def labels(query: str) -> set[str]:
        return set(read(query, EXPORTED).labels or ())

    assert labels("lorafleet_worker_ready") == {"job", "instance", "worker"}
    assert labels("sum(lorafleet_worker_ready) by (worker) > 0 # comment") == {"worker"}
    assert labels("histogram_quantile(0.9, rate(vllm:e2e_request_latency_seconds_bucket[5m:1m] offset 1h))") == {
        "job",
        "instance",
        "model_name",
    }
    assert labels("1e9 * sum by (job) (topk(3, lorafleet_errors_total)) / 1.5") == {"job"}
    assert read("time() - 1", EXPORTED).labels is None


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_is_wrong_and_what_to_do(rule: dict[str, Any]) -> None:
    assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"LoRAFleet([A-Z][A-Za-z]+)", rule["alert"])
    assert re.fullmatch(r"\d+[sm]", rule["for"])
    assert rule["labels"].keys() == {"severity"}
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    summary, description = rule["annotations"]["summary"], rule["annotations"]["description"]
    assert rule["annotations"].keys() == {"summary", "description"}
    assert len(summary) < 120 and not summary.endswith(".")
    assert len(description.split()) > 15 and description.endswith(".")


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alerts_text_names_labels_that_it_has(rule: dict[str, Any]) -> None:
    text = " ".join(rule["annotations"].values())
    assert set(re.findall(r"\$labels\.(\w+)", text)) <= (read(rule["expr"], RECORDED).labels or set())


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_series_and_flags_named_in_an_alerts_text_exist(rule: dict[str, Any]) -> None:
    text = " ".join(rule["annotations"].values())
    assert set(re.findall(r"\blorafleet_\w+", text)) <= set(EXPORTED)
    (commands,) = [action.choices for action in make_parser()._actions if isinstance(action.choices, dict)]
    assert set(re.findall(r"`lorafleet (\w+)`", text)) <= set(commands)
    assert set(re.findall(r"--[a-z][a-z-]+", text)) <= set(commands["serve"]._option_string_actions)


def test_every_alert_is_in_the_readme_and_none_else() -> None:
    names = [rule["alert"] for rule in ALERTS]
    assert len(set(names)) == len(names)
    assert set(re.findall(r"`(LoRAFleet[A-Z]\w+)`", (FOLDER / "README.md").read_text())) == set(names)


def test_a_record_is_named_after_the_labels_that_it_has() -> None:
    records = [rule["record"] for rule in RULES if "record" in rule]
    assert records
    for record in records:
        assert RECORDED[record] == set(record.split(":")[0].split("_"))


def test_adapters_waiting_and_running_are_one_series_whatever_their_combination() -> None:
    """tests/controller/gateway/metrics tests what a real gateway exports of its workers."""
    gateway = Gateway()
    seen = set()
    for waiting in ([], ["sql"], ["sql", "pirate"], ["json"]):
        for views in ([], [view("w-1", sql=Tier.DEVICE)], [view("w-1", json=Tier.DEVICE), view("w-2", sql=Tier.HOST)]):
            gateway.waiting, gateway.views = waiting, views
            (labels,) = gateway.samples("vllm:lora_requests_info")
            seen.add(tuple(sorted(labels.items())))
    assert len(seen) > 6
    used = {selector.name for query, series in QUERIES.values() for selector in read(query, series).selectors}
    assert "vllm:lora_requests_info" in used


def test_every_error_code_is_counted_from_0() -> None:
    gateway = Gateway()
    codes = [labels["code"] for labels in gateway.samples("lorafleet_errors_total")]
    assert sorted(codes) == sorted(error.code for error in ERRORS.values())


def test_panels_have_ids_titles_and_places_of_their_own() -> None:
    panels = DASHBOARD["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(set(ids)) == len(ids)
    titles = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert titles == ["Traffic", "Latency", "Workers and KV cache", "Adapters", "Faults"]
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert own and not own & cells and all(x < 24 for x, _ in own), panel["title"]
        cells |= own


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_has_queries_of_the_chosen_data_source(panel: dict[str, Any]) -> None:
    source = {"type": "prometheus", "uid": "${datasource}"}
    assert panel["title"] and panel["datasource"] == source
    assert panel["targets"]
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    for target in panel["targets"]:
        assert target["datasource"] == source
        query = read(panel_query(target), EXPORTED)
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= (query.labels or set())
        for selector in query.selectors:
            assert ("job", "=~", "$job") in selector.matchers, "the panel shows other fleets too"


def test_the_dashboard_can_be_imported_and_its_variables_have_values() -> None:
    assert DASHBOARD["schemaVersion"] >= 39
    assert {"uid", "title", "panels", "time", "templating"} <= DASHBOARD.keys()
    assert "id" not in DASHBOARD, "Grafana gives it"
    source, job = DASHBOARD["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == ("datasource", "datasource", "prometheus")
    values = re.fullmatch(r"label_values\((.+), (\w+)\)", job["query"]["query"])
    assert values is not None
    name, label = values.groups()
    assert job["name"] == "job"
    assert label in EXPORTED[name]


@pytest.mark.parametrize("command", [("check", "rules", "rules.yaml"), ("test", "rules", "rules_test.yaml")])
def test_promtool_agrees(command: tuple[str, ...]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool, which comes with Prometheus, is not on PATH")
    done = subprocess.run([promtool, *command], cwd=FOLDER, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
