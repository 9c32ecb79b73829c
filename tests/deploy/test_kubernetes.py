"""The chart and the overlay: the manifests are valid, consistent, and match the code."""

from __future__ import annotations

import ast
import copy
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import manifest_checks
import manifest_schemas
import pytest
import yaml
from aiohttp import web
from manifests import (
    CHART,
    KUBERNETES,
    OVERLAY,
    RELEASE,
    SETS,
    Manifest,
    Pod,
    RenderError,
    as_pods,
    kustomized,
    of_kind,
    pods,
    read,
    render,
    rendered,
)
from network_policies import may_talk

from lorafleet.controller.commands.command_table import make_parser
from lorafleet.controller.commands.flags import serve_config, with_flags_file
from lorafleet.controller.config import ServeConfig, UpOptions
from lorafleet.controller.gateway.__main__ import parse
from lorafleet.controller.gateway.api.app import make_app
from lorafleet.controller.gateway.api.state import GatewayState
from lorafleet.controller.gateway.config import GatewayConfig
from lorafleet.workers.options import options_of
from lorafleet.workers.sources.demo import GGUF_SHA256, MODEL_NAME, demo_model_dir

ROOT = Path(__file__).parents[2]
README = (KUBERNETES / "README.md").read_text()
DOCKERFILE = (ROOT / "deploy" / "docker" / "Dockerfile").read_text()
IN_IMAGE = PurePosixPath("/opt/lorafleet")
INSTANCE = "app.kubernetes.io/instance"
CLUSTER_SETS = [name for name in SETS if name != "single-pod"]

OTHERS_VARIABLES = {
    "RAY_health_check_initial_delay_ms": "Ray's GCS; deploy/ray/node.env has it too",
    "RAY_health_check_period_ms": "as before",
    "RAY_health_check_timeout_ms": "as before",
    "RAY_health_check_failure_threshold": "as before",
    "HF_HOME": "huggingface_hub's cache",
    "HF_TOKEN_PATH": "huggingface_hub's token",
}
"""Environment variables that are not in LoRAFleet's source, and who reads them."""

needs_schema = pytest.mark.skipif(
    not manifest_schemas.RAYCLUSTER.exists(),
    reason="KubeRay's definition of RayCluster is not here; $LORAFLEET_KUBERAY_SCHEMAS names a folder that has it",
)
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl on PATH, and no wheel has one")


@pytest.fixture(params=[*SETS, pytest.param("overlay", marks=needs_kubectl)])
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return read(kustomized() if request.param == "overlay" else rendered(request.param))


@pytest.fixture(params=CLUSTER_SETS)
def cluster_set(request: pytest.FixtureRequest) -> list[Manifest]:
    return read(rendered(request.param))


# The rendered manifests are valid.


def test_the_readme_explains_all_value_sets() -> None:
    assert set(SETS) == {"cpu-demo", "gpu", "production", "single-pod"}
    assert all(f"values/{name}.yaml" in README for name in SETS)


def test_kubernetes_schemas_take_everything_that_is_kubernetes_own_and_the_pods_of_a_raycluster(
    manifests: list[Manifest],
) -> None:
    own = [manifest for manifest in as_pods(manifests) if manifest["kind"] != "RayCluster"]
    assert [problem for manifest in own for problem in manifest_schemas.problems(manifest)] == []


@needs_schema
def test_kuberays_schema_takes_the_raycluster(cluster_set: list[Manifest]) -> None:
    (cluster,) = of_kind(cluster_set, "RayCluster")
    assert manifest_schemas.problems(cluster) == []


@needs_schema
@pytest.mark.parametrize("backend", ["redis", "rocksdb"])
def test_kuberays_schema_takes_both_ways_of_fault_tolerance(backend: str) -> None:
    settings = [f"gcsFaultTolerance.backend={backend}", "gcsFaultTolerance.redis.host=redis"]
    settings.append("gcsFaultTolerance.rocksdb.storageClassName=ssd")
    (cluster,) = of_kind(read(render("gpu", settings)), "RayCluster")
    assert manifest_schemas.problems(cluster) == []
    assert cluster["spec"]["gcsFaultToleranceOptions"]["backend"] == backend


@needs_schema
def test_the_schema_sees_a_misspelt_field_and_a_wrong_type_in_a_raycluster() -> None:
    (cluster,) = of_kind(read(rendered("cpu-demo")), "RayCluster")
    misspelt, mistyped = copy.deepcopy(cluster), copy.deepcopy(cluster)
    misspelt["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumMounts"] = []
    mistyped["spec"]["workerGroupSpecs"][0]["rayStartParams"]["num-cpus"] = 1
    assert any("volumMounts" in problem for problem in manifest_schemas.problems(misspelt))
    assert any("num-cpus" in problem for problem in manifest_schemas.problems(mistyped))


def test_the_schema_sees_a_misspelt_field_of_a_deployment() -> None:
    (deployment,) = of_kind(copy.deepcopy(read(rendered("gpu"))), "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    assert any("readynessProbe" in problem for problem in manifest_schemas.problems(deployment))


def test_every_rendered_kind_is_checked(manifests: list[Manifest]) -> None:
    assert {manifest["kind"] for manifest in manifests} <= {
        *("ConfigMap", "Deployment", "HorizontalPodAutoscaler", "Namespace", "NetworkPolicy", "PodDisruptionBudget"),
        *("RayCluster", "Service", "ServiceAccount", "ServiceMonitor"),
    }


# The overlay.


def test_the_overlay_has_what_helm_renders_today() -> None:
    assert (OVERLAY / "rendered.yaml").read_text() == render("cpu-demo"), "run `make manifests`"


@needs_kubectl
def test_the_overlay_puts_all_into_a_namespace_that_demands_the_restricted_profile() -> None:
    made = read(kustomized())
    (namespace,) = of_kind(made, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert {manifest["metadata"].get("namespace") for manifest in made if manifest is not namespace} == {
        namespace["metadata"]["name"]
    }


@needs_kubectl
def test_the_overlay_can_give_all_pods_another_image(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    shutil.copytree(OVERLAY, overlay)
    file = overlay / "kustomization.yaml"
    file.write_text(file.read_text().replace("newName: lorafleet", "newName: example.com/other"))
    command = ["kubectl", "kustomize", str(overlay)]
    made = read(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)
    images = {container["image"] for pod in pods(made) for container in pod.containers}
    assert images == {"example.com/other:cpu"}


# The rendered manifests are consistent.


def test_the_manifests_hang_together(manifests: list[Manifest]) -> None:
    assert manifest_checks.problems(manifests) == []


def find(manifests: Sequence[Manifest], kind: str, ending: str = "") -> dict[str, Any]:
    (found,) = (each for each in of_kind(manifests, kind) if each["metadata"]["name"].endswith(ending))
    return found


def template(manifests: Sequence[Manifest], part: str) -> dict[str, Any]:
    """Return the pod template of a part, to be changed."""
    if part in ("gateway", "server"):
        found: dict[str, Any] = find(manifests, "Deployment", part)["spec"]["template"]
        return found
    spec = find(manifests, "RayCluster")["spec"]
    found = (spec["headGroupSpec"] if part == "head" else spec["workerGroupSpecs"][0])["template"]
    return found


def container(manifests: Sequence[Manifest], part: str, number: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = template(manifests, part)["spec"]["containers"][number]
    return found


def mount(container: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a mount of a container, to be changed."""
    found: dict[str, Any]
    (found,) = (each for each in container["volumeMounts"] if each["name"] == name)
    return found


def flag(manifests: Sequence[Manifest], old: str, new: str) -> None:
    data = find(manifests, "ConfigMap")["data"]
    assert old in data["fleet.flags"]
    data["fleet.flags"] = data["fleet.flags"].replace(old, new)


Break = Callable[[list[Manifest]], object]

BREAKS: list[tuple[str, str, Break]] = [
    ("gpu", "is there 2 times", lambda m: m.append(find(m, "Service"))),
    ("gpu", "is no name", lambda m: find(m, "Service")["metadata"].update(name="Gateway")),
    ("gpu", "too long for what KubeRay", lambda m: find(m, "RayCluster")["metadata"].update(name="x" * 51)),
    (
        "gpu",
        "does not select its own",
        lambda m: template(m, "gateway")["metadata"]["labels"].update({INSTANCE: "other"}),
    ),
    ("gpu", "Service lorafleet-gateway selects no pod", lambda m: find(m, "Service")["spec"]["selector"].update(a="b")),
    (
        "gpu",
        "PodDisruptionBudget lorafleet-gateway selects no pod",
        lambda m: find(m, "PodDisruptionBudget", "-gateway")["spec"]["selector"]["matchLabels"].update(a="b"),
    ),
    (
        "gpu",
        "a peer of NetworkPolicy lorafleet-worker selects no pod",
        lambda m: find(m, "NetworkPolicy", "-worker")["spec"]["ingress"][0]["from"][0]["podSelector"].update(
            matchLabels={"a": "b"}
        ),
    ),
    (
        "production",
        "ServiceMonitor lorafleet-gateway selects no Service",
        lambda m: find(m, "Service")["metadata"]["labels"].clear(),
    ),
    (
        "production",
        "asks for the port metrics",
        lambda m: find(m, "ServiceMonitor")["spec"]["endpoints"][0].update(port="metrics"),
    ),
    (
        "gpu",
        "spread by labels that it has not",
        lambda m: template(m, "worker")["spec"]["topologySpreadConstraints"][0]["labelSelector"].update(
            matchLabels={"a": "b"}
        ),
    ),
    ("gpu", "which is no volume of the pod", lambda m: template(m, "head")["spec"]["volumes"].pop(0)),
    ("gpu", "which no container mounts", lambda m: container(m, "head", 1)["volumeMounts"].pop()),
    ("gpu", "two volumes of one name", lambda m: template(m, "head")["spec"]["volumes"][0].update(name="home")),
    ("gpu", "mounts 2 volumes at", lambda m: mount(container(m, "worker"), "home").update(mountPath="/tmp")),
    ("gpu", "which is not there", lambda m: find(m, "ConfigMap")["metadata"].update(name="other")),
    (
        "gpu",
        "has no bound",
        lambda m: template(m, "worker")["spec"]["volumes"][0].update(emptyDir={}),
    ),
    (
        "gpu",
        "may be read by more than its group",
        lambda m: [volume["secret"].update(defaultMode=0o444) for volume in _secret_volumes(m)],
    ),
    ("gpu", "has the account other", lambda m: template(m, "worker")["spec"].update(serviceAccountName="other")),
    (
        "gpu",
        "has a Secret in HF_TOKEN",
        lambda m: container(m, "worker")["env"].append(
            {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}
        ),
    ),
    (
        "gpu",
        "has not the token that KubeRay makes",
        lambda m: template(m, "head")["spec"]["volumes"][-1]["secret"].update(secretName="other"),
    ),
    ("gpu", "fleet cannot join Ray: it has not the token", lambda m: container(m, "head", 1)["env"].pop(0)),
    ("gpu", "does not see its processes", lambda m: template(m, "head")["spec"].pop("shareProcessNamespace")),
    (
        "gpu",
        "has the port http 2 times",
        lambda m: container(m, "gateway")["ports"].append({"name": "http", "containerPort": 1}),
    ),
    (
        "gpu",
        "its readinessProbe asks the port web",
        lambda m: container(m, "gateway")["readinessProbe"]["httpGet"].update(port="web"),
    ),
    ("gpu", "leads to the port web", lambda m: find(m, "Service")["spec"]["ports"][0].update(targetPort="web")),
    ("gpu", "ray-worker lacks a probe", lambda m: container(m, "worker").pop("livenessProbe")),
    (
        "single-pod",
        "would be restarted because there is no worker",
        lambda m: container(m, "server")["livenessProbe"]["httpGet"].update(path="/ready"),
    ),
    ("gpu", "ends in the middle of requests", lambda m: container(m, "worker").pop("lifecycle")),
    (
        "production",
        "is ended after 60 s, but may drain for 300 s",
        lambda m: template(m, "worker")["spec"].update(terminationGracePeriodSeconds=60),
    ),
    (
        "production",
        "which is not there",
        lambda m: find(m, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"].update(name="other"),
    ),
    ("production", "to which each upgrade would return", lambda m: find(m, "Deployment")["spec"].update(replicas=3)),
    (
        "production",
        "cannot tell the CPU use of gateway",
        lambda m: container(m, "gateway")["resources"]["requests"].pop("cpu"),
    ),
    ("production", "minReplicas above", lambda m: find(m, "HorizontalPodAutoscaler")["spec"].update(maxReplicas=1)),
    (
        "production",
        "cannot be asked how many it has",
        lambda m: _replace(find(m, "PodDisruptionBudget", "-h100")["spec"], "minAvailable", maxUnavailable=1),
    ),
    (
        "production",
        "worker-h100 would never let a pod go",
        lambda m: find(m, "PodDisruptionBudget", "-h100")["spec"].update(minAvailable=4),
    ),
    ("gpu", "under no NetworkPolicy that denies", lambda m: m.remove(find(m, "NetworkPolicy", "-default-deny"))),
    (
        "gpu",
        "opens 8001, which no container",
        lambda m: find(m, "NetworkPolicy", "-http")["spec"]["ingress"][0]["ports"][0].update(port=8001),
    ),
    ("gpu", "the controller cannot be reached", lambda m: m.remove(find(m, "NetworkPolicy", "-head"))),
    (
        "gpu",
        "a worker cannot be reached at 50199",
        lambda m: find(m, "NetworkPolicy", "-gateway")["spec"]["egress"][1]["ports"][0].update(endPort=50150),
    ),
    ("gpu", "a worker cannot be reached at 50300", lambda m: flag(m, "50100-50199", "50100-50300")),
    ("gpu", "a pod of Ray from another cannot be reached", lambda m: m.remove(find(m, "NetworkPolicy", "-ray"))),
    (
        "gpu",
        "the controller from outside can be reached",
        lambda m: find(m, "NetworkPolicy", "-head")["spec"]["ingress"][0].pop("from"),
    ),
    (
        "gpu",
        "Ray's head from a gateway can be reached",
        lambda m: [
            find(m, "NetworkPolicy", name)["spec"].update(**{way: [{}]})
            for name, way in (("-head", "ingress"), ("-gateway", "egress"))
        ],
    ),
    ("gpu", "may run as root", lambda m: template(m, "head")["spec"]["securityContext"].update(runAsUser=0)),
    ("gpu", "has no seccomp profile", lambda m: template(m, "head")["spec"]["securityContext"].pop("seccompProfile")),
    ("gpu", "a token for Kubernetes", lambda m: template(m, "head")["spec"].pop("automountServiceAccountToken")),
    (
        "cpu-demo",
        "may do more than it needs",
        lambda m: template(m, "head")["spec"]["initContainers"][0].pop("securityContext"),
    ),
    ("gpu", "cannot write to /tmp", lambda m: mount(container(m, "worker"), "tmp").update(readOnly=True)),
    (
        "gpu",
        "asks for less than it may take",
        lambda m: container(m, "worker")["resources"]["requests"].update(cpu="1"),
    ),
    (
        "gpu",
        "nothing scales the worker group",
        lambda m: find(m, "RayCluster")["spec"]["workerGroupSpecs"][0].update(maxReplicas=9),
    ),
    ("gpu", "the container that comes first", lambda m: template(m, "head")["spec"]["containers"].reverse()),
    ("gpu", "Ray asks for no token", lambda m: find(m, "RayCluster")["spec"].pop("rayVersion")),
    (
        "gpu",
        "dashboard is open",
        lambda m: find(m, "RayCluster")["spec"]["headGroupSpec"]["rayStartParams"].pop("include-dashboard"),
    ),
    (
        "gpu",
        "fleet does not share /dev/shm with Ray",
        lambda m: mount(container(m, "head", 1), "dshm").update(mountPath="/dev/shm2"),
    ),
    ("gpu", "which hold 4 ranks", lambda m: flag(m, "--num-workers 4", "--num-workers 5")),
]


def _secret_volumes(manifests: Sequence[Manifest]) -> list[dict[str, Any]]:
    return [volume for pod in pods(manifests) for volume in pod.spec["volumes"] if "secret" in volume]


def _replace(fields: dict[str, Any], old: str, **new: object) -> None:
    del fields[old]
    fields.update(new)


@pytest.mark.parametrize(("values", "named", "damage"), BREAKS, ids=[named for _, named, _ in BREAKS])
def test_a_broken_manifest_is_named(values: str, named: str, damage: Break) -> None:
    broken = copy.deepcopy(read(rendered(values)))
    damage(broken)
    assert any(named in problem for problem in manifest_checks.problems(broken)), manifest_checks.problems(broken)


def sayings() -> Iterator[str]:
    """Return patterns of all messages of the checks."""
    for node in ast.walk(ast.parse(Path(manifest_checks.__file__).read_text())):
        if isinstance(node, ast.Yield) and isinstance(node.value, ast.JoinedStr | ast.Constant):
            pieces = node.value.values if isinstance(node.value, ast.JoinedStr) else [node.value]
            yield "".join(re.escape(str(piece.value)) if isinstance(piece, ast.Constant) else ".*" for piece in pieces)


def test_every_message_of_the_checks_is_tested() -> None:
    said = []
    for values, _, damage in BREAKS:
        broken = copy.deepcopy(read(rendered(values)))
        damage(broken)
        said += manifest_checks.problems(broken)
    patterns = list(sayings())
    assert len(patterns) > 40
    assert [pattern for pattern in patterns if not any(re.fullmatch(pattern, problem) for problem in said)] == []


# Valid values.

REFUSED = [
    ("cpu-demo", "fleet.numWorkers=3", "workerGroups have room for 2"),
    ("gpu", "fleet.tensorParallelSize=2", "need 8 ranks; workerGroups have room for 4"),
    (
        "single-pod",
        "fleet.tensorParallelSize=2",
        "pod.gpus is 1; fleet.numWorkers 1 of fleet.tensorParallelSize 2 need 2",
    ),
    ("single-pod", "fleet.device=cpu", "which uses no GPUs"),
    ("single-pod", "gcsFaultTolerance.backend=redis", "is for mode cluster"),
    ("gpu", "gcsFaultTolerance.backend=redis", "gcsFaultTolerance.redis.host is empty"),
    ("gpu", "fleet.model=", "fleet.model is empty"),
    ("gpu", "fleet.model=/somewhere/model", "which is on no volume"),
    ("gpu", "storage.adapters.claimName=", "fleet.loraModules: support is /adapters/support, which is on no volume"),
    ("gpu", "fleet.enableLora=false", "where it would have no effect"),
    ("gpu", "fleet.flags={--num-workers 2}", "which the chart sets itself"),
    ("gpu", "fleet.flags={--host=0.0.0.0}", "which the chart sets itself"),
    ("gpu", "fleet.flags={max-loras 2}", "does not match"),
    ("gpu", "gateway.flags={--port 80}", "which the chart sets itself"),
    ("gpu", "fleet.workerPorts.first=50200", "first is more than last"),
    ("gpu", "fleet.workerPorts.first=50000", "must not include 50050"),
    ("gpu", "fleet.workerPorts.first=10000", "greater than or equal to 11000"),
    ("production", "gateway.autoscaling.minReplicas=20", "more than maxReplicas"),
    ("production", "serviceMonitor.apiKeySecret=", "/metrics requires an API key"),
    ("gpu", "fleet.numWorker=2", "numWorker is not allowed"),
    ("gpu", "workerGroups[0].gpus=2", "gpus is not allowed"),
    ("gpu", "fleet.numWorkers=two", "Invalid type"),
    ("gpu", "image.digest=latest", "does not match"),
]


@pytest.mark.parametrize(("values", "setting", "why"), REFUSED, ids=[setting for _, setting, _ in REFUSED])
def test_invalid_values_are_refused(values: str, setting: str, why: str) -> None:
    with pytest.raises(RenderError, match=f"(?i){re.escape(why)}"):
        render(values, [setting])


def test_every_value_is_in_the_schema_and_every_property_of_the_schema_has_a_value() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def compare(schema: dict[str, Any], value: Any, path: str) -> Iterator[str]:
        if schema.get("type") != "object" or "properties" not in schema:
            return
        assert schema["additionalProperties"] is False, path
        if set(schema["properties"]) != set(value):
            yield f"{path}: {set(schema['properties']) ^ set(value)}"
        for name, sub in schema["properties"].items():
            if name in value:
                yield from compare(sub, value[name], f"{path}.{name}")

    assert list(compare(schema, values, "")) == []


def test_every_value_is_commented() -> None:
    lines = (CHART / "values.yaml").read_text().splitlines()
    for number, line in enumerate(lines):
        if re.match(r"[a-z]\w*:", line):
            assert lines[number - 1].startswith("#"), line


def test_images_are_named_by_digest_where_there_is_one_and_else_by_the_version() -> None:
    assert all("@sha256:" in each["image"] for pod in pods(read(rendered("production"))) for each in pod.containers)
    assert container(read(rendered("production")), "gateway")["image"].startswith("registry.example.com/lorafleet-cpu@")
    plain = read(render("gpu", ["image.tag=", "image.repository=lorafleet"]))
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert container(plain, "head")["image"] == f"lorafleet:{version}"


def test_a_release_whose_name_begins_with_a_digit_is_refused() -> None:
    with pytest.raises(RenderError, match="begins with a letter"):
        render("gpu", release="9-lives")


def test_a_release_may_have_any_other_name() -> None:
    made = read(render("gpu", release="chat"))
    assert manifest_checks.problems(made) == []
    assert "--controller=chat-lorafleet-head-svc:50050" in container(made, "gateway")["args"]


def test_adapters_with_more_than_a_path_are_given_as_json() -> None:
    args = fleet_args(read(rendered("production")))
    by_name = {module.name: module for module in args.adapters}
    assert (by_name["support"].weight, by_name["support"].pin, by_name["sql"].weight) == (2.0, True, 1.0)


def test_words_with_spaces_and_quotes_reach_the_fleet_as_they_are() -> None:
    made = read(render("gpu", ["fleet.servedModelNames={it's mine,b c}"]))
    assert fleet_args(made).served_model_names == ["it's mine", "b c"]


# The manifests match the code.


def with_flags(manifests: Sequence[Manifest], words: Sequence[str], folder: Path) -> list[str]:
    """Return a command line with the ConfigMap's flags in place of @FILE."""
    path = folder / "fleet.flags"
    path.write_text(find(manifests, "ConfigMap")["data"]["fleet.flags"])
    mounted = "/etc/lorafleet/fleet.flags"
    return with_flags_file([f"@{path}" if word == f"@{mounted}" else word for word in words])


def fleet_args(manifests: Sequence[Manifest]) -> Any:
    words = shlex.split(find(manifests, "ConfigMap")["data"]["fleet.flags"], comments=True)
    return make_parser().parse_args(["up", *words])


def commands(manifests: Sequence[Manifest]) -> Iterator[tuple[Pod, dict[str, Any], list[str]]]:
    """Return all `lorafleet` commands: those of containers and of their hooks."""
    for pod in pods(manifests):
        for each in pod.containers:
            hook = each.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
            for words in ([*each.get("command", ()), *each.get("args", ())], hook):
                if words[:1] == ["lorafleet"]:
                    yield pod, each, words[1:]


def test_the_code_takes_every_command_with_its_flags(manifests: list[Manifest], tmp_path: Path) -> None:
    ran = set()
    for _, _, words in commands(manifests):
        ran.add(words[0])
        if words[0] == "gateway":
            for file in ("token", "tenants.json"):
                (tmp_path / file).write_text('[{"name": "a", "api_keys": ["k"]}]')
            config, _ = parse([re.sub(r"/run/secrets/\w+", str(tmp_path), word) for word in words[1:]])
            assert config.host == "0.0.0.0"
            continue
        words = [re.sub(r"/run/secrets/tenants", str(tmp_path), word) for word in words]
        (tmp_path / "tenants.json").write_text('[{"name": "a", "api_keys": ["k"]}]')
        args = make_parser().parse_args(with_flags(manifests, words, tmp_path))
        if words[0] in ("serve", "up"):
            serve_config(args)
    is_cluster = bool(of_kind(manifests, "RayCluster"))
    assert ran == ({"up", "gateway", "drain"} if is_cluster else {"serve"})


def test_the_fleets_flags_are_those_of_the_values(cluster_set: list[Manifest], tmp_path: Path) -> None:
    (words,) = (words for _, each, words in commands(cluster_set) if each["name"] == "fleet")
    args = make_parser().parse_args(with_flags(cluster_set, words, tmp_path))
    assert args.follow and args.gateways == "none" and args.enable_lora
    assert args.worker_ports == manifest_checks.worker_ports(cluster_set)
    # A fleet is identified by its flags, which must be the same after the head has moved.
    assert args.ray_address == "127.0.0.1:6379"


def test_ports_are_those_of_the_code(cluster_set: list[Manifest], tmp_path: Path) -> None:
    defaults = {entry.name: entry.default for owner in (UpOptions, ServeConfig) for entry in options_of(owner)}
    assert (defaults["controller_port"], defaults["port"]) == (50050, 8000)
    controller = {port["name"]: port["containerPort"] for port in container(cluster_set, "head")["ports"]}["controller"]
    (fleet,) = (words for _, each, words in commands(cluster_set) if each["name"] == "fleet")
    (gateway,) = (words for _, each, words in commands(cluster_set) if each["name"] == "gateway")
    assert make_parser().parse_args(with_flags(cluster_set, fleet, tmp_path)).controller_port == controller
    (at,) = (word.split("=")[1] for word in gateway if word.startswith("--controller="))
    assert at == f"{RELEASE}-head-svc:{controller}", "KubeRay's Service of the head"
    (port,) = (word.split("=")[1] for word in gateway if word.startswith("--port="))
    assert int(port) == container(cluster_set, "gateway")["ports"][0]["containerPort"]


def gateway_paths() -> set[str]:
    app = make_app(GatewayState(GatewayConfig(controller="localhost:1", token="-")))
    return {
        route.resource.canonical
        for route in app.router.routes()
        if isinstance(route.resource, web.Resource) and route.method == "GET"
    }


def test_what_probes_and_prometheus_ask_for_are_paths_of_the_gateway_or_of_ray(manifests: list[Manifest]) -> None:
    ray = "/api/healthz"  # of Ray's agent, since Ray 2.53; KubeRay uses it too
    known = gateway_paths()
    for pod in pods(manifests):
        for each in pod.spec["containers"]:
            paths = {each[kind]["httpGet"]["path"] for kind in each if kind.endswith("Probe")}
            assert paths <= ({ray} if each["name"].startswith("ray-") else known)
    for monitor in of_kind(manifests, "ServiceMonitor"):
        assert {endpoint["path"] for endpoint in monitor["spec"]["endpoints"]} <= known


def source() -> str:
    files = (file for folder in ("controller", "kernels", "workers") for file in (ROOT / folder).rglob("*.py"))
    return "\n".join(file.read_text() for file in files)


def test_environment_variables_are_in_the_source_or_explained() -> None:
    code = source()
    used = {
        variable["name"]
        for values in SETS
        for pod in pods(read(render(values, ["fleet.huggingFaceTokenSecret=hub"])))
        for each in pod.containers
        for variable in each.get("env", ())
    }
    assert {name for name in used if name not in OTHERS_VARIABLES and f'"{name}"' not in code} == set()
    assert set(OTHERS_VARIABLES) <= used


def test_paths_are_in_the_image_or_on_a_volume(manifests: list[Manifest], tmp_path: Path) -> None:
    for pod, each, words in commands(manifests):
        mounted = [PurePosixPath(mount["mountPath"]) for mount in each["volumeMounts"]]
        if words[0] in ("up", "serve"):
            words = with_flags(manifests, words, tmp_path)
        paths = [path for word in words for path in re.findall(r"(?<![\w.])/[\w./-]+", word)]
        for path in (PurePosixPath(path) for path in paths if not path.startswith(str(tmp_path))):
            if path.is_relative_to(IN_IMAGE):
                assert (ROOT / path.relative_to(IN_IMAGE)).exists(), path
            else:
                assert any(path.is_relative_to(mount) for mount in mounted), f"{pod.name}: {path}"


def test_the_model_and_adapters_are_at_the_same_paths_wherever_they_are_read(cluster_set: list[Manifest]) -> None:
    def of(part: str, number: int = 0) -> set[tuple[str, str]]:
        mounts = container(cluster_set, part, number)["volumeMounts"]
        return {
            (mount["name"], mount["mountPath"]) for mount in mounts if mount["name"] in ("model", "adapters", "cache")
        }

    assert of("head") == of("head", 1) == of("worker")


def test_pods_are_the_user_of_the_image_and_mount_what_it_names(manifests: list[Manifest]) -> None:
    (user,) = re.findall(r"USER (\d+):(\d+)", DOCKERFILE)
    settings = dict(re.findall(r"\b(HOME|LORAFLEET_CACHE|HF_HOME)=(\S+)", DOCKERFILE))
    assert f"COPY examples {IN_IMAGE}/examples" in DOCKERFILE
    for pod in pods(manifests):
        context = pod.spec["securityContext"]
        assert (str(context["runAsUser"]), str(context["runAsGroup"])) == user
        assert str(context["fsGroup"]) == user[1]
        for each in pod.containers:
            paths = {mount["mountPath"] for mount in each["volumeMounts"]}
            assert settings["HOME"] in paths
            for variable in each.get("env", ()):
                if variable["name"] in settings:
                    assert variable["value"] == settings[variable["name"]]


def test_the_demo_model_is_where_the_script_puts_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORAFLEET_CACHE", str(tmp_path))
    folder = tmp_path / "models" / f"{MODEL_NAME}-{GGUF_SHA256[:12]}"
    folder.mkdir(parents=True)  # as if it were there already, so that nothing is fetched
    demo = read(rendered("cpu-demo"))
    assert fleet_args(demo).model == f"/cache/{demo_model_dir().relative_to(tmp_path)}"
    scripts = [each["command"] for pod in pods(demo) for each in pod.spec.get("initContainers", ())]
    assert scripts == [["python", f"{IN_IMAGE}/examples/demo_model.py"]] * 2, "of the head and of the workers"


def test_the_chart_names_the_versions_that_are_installed() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == chart["version"] == version
    (ray,) = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert yaml.safe_load((CHART / "values.yaml").read_text())["rayVersion"] == ray


def test_ray_start_has_the_parameters_that_it_is_given_and_their_ports_are_apart(cluster_set: list[Manifest]) -> None:
    ray = str(Path(sys.executable).parent / "ray")
    known = subprocess.run([ray, "start", "--help"], capture_output=True, text=True, check=True).stdout
    spec = find(cluster_set, "RayCluster")["spec"]
    low, high = manifest_checks.worker_ports(cluster_set)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        given = group["rayStartParams"]
        assert [name for name in given if f"--{name} " not in known] == []
        ports = [int(value) for name, value in given.items() if name.endswith("-port") and "worker" not in name]
        ports += [6379, 50050]
        assert len(set(ports)) == len(ports)
        ranges = [range(int(given["min-worker-port"]), int(given["max-worker-port"]) + 1), range(low, high + 1)]
        assert not any(port in taken for port in ports for taken in ranges)
        assert not set(ranges[0]) & set(ranges[1])


# Secrets and networks.


def secrets(manifests: Sequence[Manifest]) -> set[str]:
    """Return the Secrets the user must create. KubeRay creates one with the cluster's name."""
    found = {volume["secret"]["secretName"] for volume in _secret_volumes(manifests)} - {RELEASE}
    for monitor in of_kind(manifests, "ServiceMonitor"):
        found |= {end["authorization"]["credentials"]["name"] for end in monitor["spec"]["endpoints"]}
    for cluster in of_kind(manifests, "RayCluster"):
        password = cluster["spec"].get("gcsFaultToleranceOptions", {}).get("redisPassword")
        found |= {password["valueFrom"]["secretKeyRef"]["name"]} if password else set()
    return found


def test_the_readme_says_how_to_make_each_secret(manifests: list[Manifest]) -> None:
    for name in secrets(manifests):
        assert re.search(rf"create secret generic {name} ", README), name


def test_files_of_secrets_have_the_names_of_the_keys_that_the_readme_makes() -> None:
    made = dict(re.findall(r"create secret generic (\S+) --from-(?:literal|file)=([\w.]+)", README))
    assert made["lorafleet-token"] == "token" and made["lorafleet-tenants"] == "tenants.json"
    gateway = container(read(rendered("production")), "gateway")
    files = {Path(word.split("=")[1]).name for word in gateway["args"] if "/run/secrets/" in word}
    assert files == {"token", "tenants.json"}
    assert made["lorafleet-redis"] == "password" and made["lorafleet-metrics-key"] == "key"


def test_only_the_named_clients_reach_the_gateways_in_production() -> None:
    made = read(rendered("production"))
    (gateway,) = (pod for pod in pods(made) if pod.labels["app.kubernetes.io/component"] == "gateway")
    policies = of_kind(made, "NetworkPolicy")
    assert not may_talk(policies, None, gateway, 8000)
    (policy,) = (policy for policy in policies if policy["metadata"]["name"].endswith("-http"))
    namespaces = [
        peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
        for peer in policy["spec"]["ingress"][0]["from"]
    ]
    assert namespaces == ["ingress", "monitoring"]


def test_only_pods_that_read_models_reach_the_internet_and_only_as_the_values_allow() -> None:
    reach = {}
    for values in ("cpu-demo", "production"):
        made = read(rendered(values))
        policies = of_kind(made, "NetworkPolicy")
        for pod in pods(made):
            reach[values, pod.labels["app.kubernetes.io/component"]] = may_talk(policies, pod, None, 443)
    assert reach == {
        ("cpu-demo", "head"): True,
        ("cpu-demo", "worker"): True,
        ("cpu-demo", "gateway"): False,
        ("production", "head"): False,
        ("production", "worker"): False,
        ("production", "gateway"): False,
    }


def test_only_the_head_and_the_job_that_empties_it_reach_redis() -> None:
    made = read(rendered("production"))
    policies = of_kind(made, "NetworkPolicy")
    by_part = {pod.labels["app.kubernetes.io/component"]: pod for pod in pods(made)}
    job = Pod("redis-cleanup", by_part["head"].labels | {"ray.io/node-type": "redis-cleanup"}, {}, 1)
    assert may_talk(policies, by_part["head"], None, 6379) and may_talk(policies, job, None, 6379)
    assert not may_talk(policies, by_part["worker"], None, 6379)
    assert not may_talk(policies, by_part["gateway"], None, 6379)


def test_the_readme_says_what_was_not_tried() -> None:
    assert "None of this was applied to a real API server" in README
