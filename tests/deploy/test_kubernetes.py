"""The chart and the overlay, rendered for real and held against schemas, against each other, and against the code.

Nothing here talks to an API server; what only one could say is not known.
"""

from __future__ import annotations

import copy
import difflib
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from demo_model import GGUF_SHA256, MODEL_NAME
from manifests import KUBERNETES, RELEASE, Document, Pod, name_of, pods, problems, read, render, rendered, worker_ports

from lorafleet.controller.cli import make_parser
from lorafleet.controller.config import ServeConfig
from lorafleet.controller.fleet_flags import serve_config, with_flags_file
from lorafleet.controller.gateway.__main__ import parse as parse_gateway
from lorafleet.controller.gateway.app import make_app
from lorafleet.controller.gateway.config import GatewayConfig
from lorafleet.controller.gateway.state import GatewayState

REPOSITORY = KUBERNETES.parents[1]
VALUE_SETS = ["cpu-demo", "gpu", "production", "single-pod"]
VERSIONS = ["1.30", "1.33", "1.37"]  # of Kubernetes; the oldest is the chart's kubeVersion
SCHEMAS = Path(os.environ.get("LORAFLEET_KUBERAY_SCHEMAS", REPOSITORY.parent / "shared" / "schemas" / "kuberay"))
# What the pages of deploy/ tell to make before: Secrets with their keys, and claims.
SECRETS = {"lorafleet": {"token", "auth_token"}, "lorafleet-tenants": {"tenants.json"}, "redis": {"password"}}
SECRETS |= {"lorafleet-prometheus": {"key"}}
CLAIMS = {"models", "adapters"}
# Ray's own settings; https://docs.ray.io and ray/_private say what each does.
RAY_VARIABLES = {
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_USAGE_STATS_ENABLED",
    "RAY_worker_niceness",
    "RAY_health_check_period_ms",
    "RAY_health_check_timeout_ms",
}
RAY_PATHS = {"/api/healthz", "/api/local_raylet_healthz"}  # of its agent, on 52365
IN_IMAGE = ("/opt/lorafleet/examples",)  # deploy/docker/Dockerfile


@pytest.fixture(params=VALUE_SETS)
def documents(request: pytest.FixtureRequest) -> list[Document]:
    return render(request.param)


@cache
def kuberay_validator() -> jsonschema.Draft202012Validator:
    """KubeRay's RayCluster, closed: unknown fields are errors, as an API server says them."""
    path = SCHEMAS / "ray.io_rayclusters.yaml"
    if not path.exists():
        pytest.skip(f"KubeRay's schemas are not at {SCHEMAS}; $LORAFLEET_KUBERAY_SCHEMAS says where they are")
    versions = yaml.safe_load(path.read_text())["spec"]["versions"]
    (schema,) = [version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1"]
    _close(schema)
    return jsonschema.Draft202012Validator(schema)


def _close(schema: Any) -> None:
    if isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        if schema.pop("x-kubernetes-int-or-string", None):
            schema.pop("anyOf", None)
            schema["type"] = ["integer", "string"]
        defaults = {
            name for name, of in schema.get("properties", {}).items() if isinstance(of, dict) and "default" in of
        }
        if "required" in schema and isinstance(schema["required"], list):
            schema["required"] = [name for name in schema["required"] if name not in defaults]
        for value in schema.values():
            _close(value)
    elif isinstance(schema, list):
        for value in schema:
            _close(value)


def open_schema(document: Document) -> bool:
    """Whether only an operator's CRD describes it, which is not here."""
    return document["apiVersion"].startswith("monitoring.coreos.com/")


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_schemas_take_all_documents(documents: list[Document], version: str) -> None:
    for document in documents:
        if not document["apiVersion"].startswith("ray.io/") and not open_schema(document):
            kubernetes_validate.validate(document, version, strict=True)
    for pod in pods(documents):  # a RayCluster's too
        made = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", "labels": pod.labels}, "spec": pod.spec}
        kubernetes_validate.validate(made, version, strict=True)


def test_kuberays_schema_takes_the_ray_cluster_and_refuses_a_misspelt_one() -> None:
    validator = kuberay_validator()
    for values in ("cpu-demo", "gpu", "production"):
        (cluster,) = [document for document in render(values) if document["kind"] == "RayCluster"]
        assert [error.message for error in validator.iter_errors(cluster)] == []
        cluster["spec"]["workerGroupSpecs"][0]["replica"] = 1
        assert "'replica' was unexpected" in next(validator.iter_errors(cluster)).message
    rocksdb = render("production", "--set", "faultTolerance.backend=rocksdb")
    (cluster,) = [document for document in rocksdb if document["kind"] == "RayCluster"]
    assert [error.message for error in validator.iter_errors(cluster)] == []


def test_a_schema_refuses_what_is_misspelt() -> None:
    (deployment,) = [document for document in render("gpu") if document["kind"] == "Deployment"]
    deployment["spec"]["template"]["spec"]["containers"][0]["port"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="port"):
        kubernetes_validate.validate(deployment, VERSIONS[0], strict=True)


def test_all_parts_fit_together(documents: list[Document]) -> None:
    assert list(problems(documents)) == []


def one(documents: list[Document], kind: str, suffix: str = "") -> Document:
    (found,) = [it for it in documents if it["kind"] == kind and it["metadata"]["name"].endswith(suffix)]
    return found["spec"]


def template(documents: list[Document]) -> Document:
    spec: Document = one(documents, "Deployment")["template"]["spec"]
    return spec


def worker(documents: list[Document]) -> Document:
    spec: Document = one(documents, "RayCluster")["workerGroupSpecs"][0]["template"]["spec"]
    return spec


BREAKS: list[tuple[Callable[[list[Document]], object], str]] = [
    (lambda it: it.append(copy.deepcopy(it[0])), "is there twice"),
    (lambda it: one(it, "Service")["selector"].update({"a": "b"}), "Service lorafleet selects no pod"),
    (lambda it: one(it, "Deployment")["selector"]["matchLabels"].update({"a": "b"}), "does not select its own pods"),
    (
        lambda it: one(it, "PodDisruptionBudget", "workers")["selector"]["matchLabels"].update({"a": "b"}),
        "workers selects no",
    ),
    (lambda it: one(it, "PodDisruptionBudget", "gateway").update(minAvailable=9), "wants more than the 3 pods"),
    (lambda it: one(it, "PodDisruptionBudget", "gateway").update(maxUnavailable=0), "lets no node ever be emptied"),
    (lambda it: one(it, "HorizontalPodAutoscaler")["scaleTargetRef"].update(name="x"), "there is no Deployment x"),
    (lambda it: one(it, "HorizontalPodAutoscaler").update(minReplicas=99), "minReplicas is larger"),
    (lambda it: one(it, "Deployment").update(replicas=3), "says its replicas too"),
    (lambda it: template(it)["containers"][0]["resources"]["requests"].pop("cpu"), "requests no cpu"),
    (lambda it: one(it, "Service")["ports"][0].update(targetPort="htp"), "has no port htp"),
    (lambda it: template(it)["volumes"].pop(0), "mounts tmp, which is no volume"),
    (lambda it: template(it)["volumes"].append({"name": "more", "emptyDir": {}}), "more is mounted nowhere"),
    (
        lambda it: template(it)["containers"][0]["volumeMounts"][0].update(mountPath="/run/secrets/lorafleet"),
        "at one path",
    ),
    (lambda it: template(it).update(serviceAccountName="x"), "there is no ServiceAccount x"),
    (lambda it: it.remove(next(d for d in it if d["kind"] == "ConfigMap")), "there is no ConfigMap lorafleet-flags"),
    (lambda it: template(it)["containers"][0].pop("readinessProbe"), "not all three probes"),
    (
        lambda it: template(it)["containers"][0]["livenessProbe"]["httpGet"].update(path="/ready"),
        "is ended when others",
    ),
    (lambda it: template(it)["containers"][0]["livenessProbe"]["httpGet"].update(port="htp"), "asks port htp"),
    (lambda it: template(it).update(terminationGracePeriodSeconds=300), "gateway is killed before its drain"),
    (lambda it: worker(it).update(terminationGracePeriodSeconds=300), "ray is killed before its drain"),
    (
        lambda it: worker(it)["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"].update({"a": "b"}),
        "do not select",
    ),
    (lambda it: one(it, "NetworkPolicy", "gateway")["ingress"][0]["ports"][0].update(port=80), "nothing listens on 80"),
    (
        lambda it: one(it, "NetworkPolicy", "-ray")["ingress"][1]["ports"][1].update(endPort=50200),
        "nothing listens on 50100",
    ),
    (
        lambda it: one(it, "NetworkPolicy", "gateway")["egress"][0]["ports"][0].update(port=50051),
        "lets nobody from there in",
    ),
    (lambda it: one(it, "NetworkPolicy", "-ray")["ingress"].pop(1), "lets nobody from there in"),
    (lambda it: one(it, "NetworkPolicy", "-ray")["podSelector"]["matchLabels"].update({"a": "b"}), "selects no pod"),
]


@pytest.mark.parametrize(("break_it", "says"), BREAKS)
def test_what_does_not_fit_is_named(break_it: Callable[[list[Document]], object], says: str) -> None:
    documents = render("production")
    break_it(documents)
    assert any(says in problem for problem in problems(documents)), list(problems(documents))


@pytest.mark.parametrize(
    ("values", "arguments", "says"),
    [
        ("gpu", ("--set", "worker.count=2"), "worker"),
        ("gpu", ("--set", "workers.count=3"), "need 6 places; workerGroups have 4 GPUs"),
        ("cpu-demo", ("--set", "workers.tensorParallelSize=3"), "need 6 places; workerGroups have 4 CPUs"),
        ("cpu-demo", ("--set", "workerGroups[0].cpu=500m"), "cpu"),
        ("cpu-demo", ("--set", "model.claim=models"), "model.claim and model.demo are both given"),
        ("cpu-demo", ("--set", "model.demo=false"), "give model.claim"),
        ("gpu", ("--set", "model.path="), "model.path is empty"),
        ("gpu", ("--set", "faultTolerance.backend=redis"), "give faultTolerance.redisAddress"),
        ("gpu", ("--set", "mode=both"), "mode"),
        ("gpu", ("--set", "flags={32}"), "flags"),
    ],
)
def test_values_that_cannot_be_are_refused(values: str, arguments: tuple[str, ...], says: str) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        render(values, *arguments)
    assert says in refused.value.stderr


def containers(documents: list[Document]) -> Iterator[tuple[Pod, Document]]:
    for pod in pods(documents):
        for container in pod.containers:
            yield pod, container


def fleet(documents: list[Document], tmp_path: Path) -> tuple[ServeConfig, Any, Pod]:
    """What the container that runs the fleet is told, through the real parser."""
    (flags,) = [document["data"]["fleet.flags"] for document in documents if document["kind"] == "ConfigMap"]
    file = tmp_path / "fleet.flags"
    file.write_text(flags)
    ((pod, told),) = [
        (pod, container["args"])
        for pod, container in containers(documents)
        if container.get("args", [""])[0] in ("up", "serve")
    ]
    assert told[1] == "@/etc/lorafleet/fleet.flags"
    args = make_parser().parse_args(with_flags_file([told[0], f"@{file}", *told[2:]]))
    return serve_config(args), args, pod


def has_path(pod: Pod, container: Document, path: str) -> bool:
    mounts = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
    return any(Path(path).is_relative_to(folder) for folder in (*mounts, *IN_IMAGE))


def test_the_fleets_flags_ports_and_paths_are_the_codes(documents: list[Document], tmp_path: Path) -> None:
    config, args, pod = fleet(documents, tmp_path)
    (container,) = [it for it in pod.spec["containers"] if it.get("args", [""])[0] in ("up", "serve")]
    paths = [config.engine.model, *(adapter.path for adapter in config.adapters), *config.lora_roots]
    for path in [*paths, *filter(None, [config.tenants_file])]:
        assert has_path(pod, container, path), path
    for path in paths:
        if path.startswith(IN_IMAGE):
            assert (REPOSITORY / path.removeprefix("/opt/lorafleet/")).is_dir(), path
    if args.command == "serve":
        assert config.host == "0.0.0.0" and config.port == pod.ports["http"]
        return
    (ray,) = [it for it in pod.spec["containers"] if it["name"] == "ray"]
    for path in ("/tmp", "/dev/shm"):
        shared = {
            mount["name"] for it in (ray, container) for mount in it["volumeMounts"] if mount["mountPath"] == path
        }
        assert len(shared) == 1, "one cannot join Ray's node otherwise"
    assert pod.spec["shareProcessNamespace"], "nor so"
    assert has_path(pod, container, str(args.token_file))
    assert args.follow and args.gateways == "none"
    assert args.controller_port == pod.ports["controller"]
    assert config.worker_ports is not None
    assert worker_ports(documents) == range(config.worker_ports[0], config.worker_ports[1] + 1)
    for group in pods(documents):  # whoever loads the model has it at the same path
        for it in group.spec["containers"]:
            if it["name"] == "ray":
                assert all(has_path(group, it, path) for path in paths), group.where


def test_the_demo_models_path_is_what_the_script_says() -> None:
    (flags,) = [it["data"]["fleet.flags"] for it in render("cpu-demo") if it["kind"] == "ConfigMap"]
    assert flags.splitlines()[0] == f"/cache/models/{MODEL_NAME}-{GGUF_SHA256[:12]}"
    scripts = [it["command"][1] for _, it in containers(render("cpu-demo")) if it["name"] == "demo-model"]
    assert scripts == ["/opt/lorafleet/examples/demo_model.py"] * 2
    assert "LORAFLEET_CACHE=/cache" in (REPOSITORY / "deploy/docker/Dockerfile").read_text()


def test_gateways_flags_and_addresses_are_the_codes(documents: list[Document], tmp_path: Path) -> None:
    found = [(pod, it) for pod, it in containers(documents) if it.get("args", [""])[0] == "gateway"]
    for pod, container in found:
        token, tenants = tmp_path / "token", tmp_path / "tenants.json"
        token.write_text("token")
        tenants.write_text('[{"name": "acme", "api_keys": ["key"]}]')
        here = {"--token-file": token, "--tenants": tenants}
        told = []
        for word in container["args"][1:]:
            name, _, path = word.partition("=")
            assert name not in here or has_path(pod, container, path), word
            told.append(f"{name}={here[name]}" if name in here else word)
        config, _ = parse_gateway(told)
        assert config.host == "0.0.0.0" and config.port == pod.ports["http"]
        # KubeRay names the head's service so, with the ports of the head's first container.
        _, args, head = fleet(documents, tmp_path)
        assert config.controller == f"{RELEASE}-head-svc:{args.controller_port}"
        assert args.controller_port in [port["containerPort"] for port in head.spec["containers"][0]["ports"]]
    assert len(found) == (0 if any(it.get("args", [""])[0] == "serve" for _, it in containers(documents)) else 1)


def test_commands_that_stop_a_pod_are_the_codes(documents: list[Document]) -> None:
    for _, container in containers(documents):
        command = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
        if command is not None:
            assert command[0] == "lorafleet"
            make_parser().parse_args(command[1:])


async def test_probes_and_scrapes_ask_what_there_is(documents: list[Document]) -> None:
    app = make_app(GatewayState(GatewayConfig(controller="localhost:1", token="-")))
    routes = {resource.canonical for resource in app.router.resources()}
    for pod, container in containers(documents):
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            request = container.get(kind, {}).get("httpGet")
            if request is not None:
                known = RAY_PATHS if request["port"] == 52365 else routes
                assert request["path"] in known, (pod.where, kind)
    for document in documents:
        if document["kind"] == "PodMonitor":
            assert document["spec"]["podMetricsEndpoints"][0]["path"] in routes
            assert "lorafleet" in document["metadata"]["name"], "deploy/monitoring's rules look for that"


def test_variables_are_the_codes_or_rays(documents: list[Document]) -> None:
    source = "".join(
        path.read_text() for folder in ("controller", "workers") for path in (REPOSITORY / folder).rglob("*.py")
    )
    for pod, container in containers(documents):
        for variable in container.get("env", []):
            assert variable["name"] in RAY_VARIABLES or variable["name"] in source, variable
            assert not variable["name"].endswith("_PATH") or has_path(pod, container, variable["value"]), variable
    for name in ("RAY_health_check_period_ms", "RAY_worker_niceness"):
        assert name in (REPOSITORY / "deploy/ray/node.env").read_text(), "both ways to start Ray agree"


def test_secrets_and_claims_are_those_that_the_page_tells_to_make(documents: list[Document]) -> None:
    page = (KUBERNETES / "README.md").read_text()
    for pod in pods(documents):
        for volume in pod.spec.get("volumes", []):
            if "secret" in volume:
                keys = {item["key"] for item in volume["secret"].get("items", [])}
                assert keys <= SECRETS[volume["secret"]["secretName"]]
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in CLAIMS
    for name, keys in SECRETS.items():
        assert name in page and all(key in page for key in keys), name


def test_the_ray_cluster_is_closed_and_of_the_installed_ray(documents: list[Document]) -> None:
    for document in documents:
        if document["kind"] == "RayCluster":
            spec = document["spec"]
            assert spec["authOptions"]["mode"] == "token"
            assert spec["headGroupSpec"]["rayStartParams"]["include-dashboard"] == "false"
            constraints = (REPOSITORY / "constraints.txt").read_text()
            assert f"ray=={spec['rayVersion']}\n" in constraints


def test_the_overlay_is_over_what_the_chart_renders_today() -> None:
    committed = (KUBERNETES / "cpu-demo" / "rendered.yaml").read_text()
    today = rendered("--values", str(KUBERNETES / "values" / "cpu-demo.yaml"))
    changes = difflib.unified_diff(
        committed.splitlines(), today.splitlines(), "committed", "rendered", lineterm="", n=0
    )
    assert committed == today, "make manifests renders it anew\n" + "\n".join(changes)


def kustomize() -> str:
    program = shutil.which("kubectl")
    if program is None:
        pytest.skip("there is no kubectl")
    return subprocess.run(
        [program, "kustomize", KUBERNETES / "cpu-demo"], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("version", VERSIONS)
def test_the_overlay_fits_as_the_chart_does(version: str) -> None:
    documents = read(kustomize())
    namespaces = {document["metadata"].get("namespace") for document in documents if document["kind"] != "Namespace"}
    assert namespaces == {"lorafleet"}
    (namespace,) = [document for document in documents if document["kind"] == "Namespace"]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert list(problems([document for document in documents if document["kind"] != "Namespace"])) == []
    for document in documents:
        if not document["apiVersion"].startswith("ray.io/"):
            kubernetes_validate.validate(document, version, strict=True)
        else:
            assert [error.message for error in kuberay_validator().iter_errors(document)] == []


def test_the_pages_commands_name_what_there_is() -> None:
    page = (KUBERNETES / "README.md").read_text()
    for values in re.findall(r"values/([\w-]+)\.yaml", page):
        assert values in VALUE_SETS
    assert set(re.findall(r"values/([\w-]+)\.yaml", page)) == set(VALUE_SETS)
    for path in re.findall(r"deploy/kubernetes/[\w./-]+", page):
        assert (REPOSITORY / path.rstrip(".")).exists(), path
    assert importlib.util.find_spec("kubernetes_validate") is not None


def test_every_document_is_labelled_as_the_releases(documents: list[Document]) -> None:
    for document in documents:
        labels = document["metadata"]["labels"]
        assert labels["app.kubernetes.io/instance"] == RELEASE, name_of(document)
