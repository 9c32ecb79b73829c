"""Kubernetes manifests: rendered by Helm, and read for what schemas do not see. `problems` says what does not fit."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

KUBERNETES = Path(__file__).parents[1] / "deploy" / "kubernetes"
RELEASE = "lorafleet"
Document = dict[str, Any]


@functools.cache
def rendered(*arguments: str) -> str:
    """What `helm template` prints for a release. Raises `CalledProcessError` with Helm's words in `stderr`."""
    helm = shutil.which("helm", path=str(Path(sys.executable).parent)) or shutil.which("helm")
    assert helm is not None, "there is no helm; it comes with the package helm-binary"
    command = [helm, "template", RELEASE, str(KUBERNETES / "chart"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def render(values: str, *arguments: str) -> list[Document]:
    """The documents of a value set, and of Helm's own flags behind it."""
    return read(rendered("--values", str(KUBERNETES / "values" / f"{values}.yaml"), *arguments))


def read(text: str) -> list[Document]:
    return [document for document in yaml.safe_load_all(text) if document is not None]


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod that some document makes."""

    where: str
    labels: Mapping[str, str]
    spec: Document
    replicas: int  # at least so many

    @property
    def containers(self) -> list[Document]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def ports(self) -> dict[str, int]:
        """By name."""
        return {port["name"]: port["containerPort"] for it in self.containers for port in it.get("ports", [])}


def name_of(document: Document) -> str:
    return f"{document['kind']} {document['metadata']['name']}"


def pods(documents: Sequence[Document]) -> list[Pod]:
    """Of Deployments and RayClusters."""
    found = []
    scaled = {
        document["spec"]["scaleTargetRef"]["name"]: document["spec"]["minReplicas"]
        for document in documents
        if document["kind"] == "HorizontalPodAutoscaler"
    }
    for document in documents:
        where, spec = name_of(document), document.get("spec", {})
        if document["kind"] == "Deployment":
            replicas = spec.get("replicas", scaled.get(document["metadata"]["name"], 1))
            found.append(_pod(where, spec["template"], replicas))
        elif document["kind"] == "RayCluster":
            found.append(_pod(f"{where}, head", spec["headGroupSpec"]["template"], 1))
            for group in spec["workerGroupSpecs"]:
                found.append(_pod(f"{where}, {group['groupName']}", group["template"], group["replicas"]))
    return found


def _pod(where: str, template: Document, replicas: int) -> Pod:
    return Pod(where, template["metadata"]["labels"], template["spec"], replicas)


def selects(selector: Document, labels: Mapping[str, str]) -> bool:
    """A LabelSelector's answer."""
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In", expression
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def problems(documents: Sequence[Document]) -> Iterator[str]:
    """What does not fit together, a line each."""
    names = [name_of(document) for document in documents]
    yield from (f"{name} is there twice" for name in set(names) if names.count(name) > 1)
    found = pods(documents)
    for pod in found:
        yield from _volume_problems(pod, documents)
        yield from _probe_problems(pod)
        yield from _drain_problems(pod)
    for document in documents:
        yield from _selector_problems(document, found)
        if document["kind"] == "Service":
            yield from _service_problems(document, found)
        elif document["kind"] == "PodDisruptionBudget":
            yield from _budget_problems(document, found)
        elif document["kind"] == "HorizontalPodAutoscaler":
            yield from _autoscaler_problems(document, documents)
        elif document["kind"] == "NetworkPolicy":
            yield from _policy_problems(document, documents, found)


def _volume_problems(pod: Pod, documents: Sequence[Document]) -> Iterator[str]:
    names = [volume["name"] for volume in pod.spec.get("volumes", [])]
    mounted = set()
    for container in pod.containers:
        paths = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
        if len(set(paths)) < len(paths):
            yield f"{pod.where}: {container['name']} has two volumes at one path"
        for mount in container.get("volumeMounts", []):
            mounted.add(mount["name"])
            if mount["name"] not in names:
                yield f"{pod.where}: {container['name']} mounts {mount['name']}, which is no volume of the pod"
    yield from (f"{pod.where}: the volume {name} is mounted nowhere" for name in names if name not in mounted)
    made = {name_of(document) for document in documents}
    for volume in pod.spec.get("volumes", []):
        if "configMap" in volume and f"ConfigMap {volume['configMap']['name']}" not in made:
            yield f"{pod.where}: there is no ConfigMap {volume['configMap']['name']}"
    if f"ServiceAccount {pod.spec.get('serviceAccountName')}" not in made:
        yield f"{pod.where}: there is no ServiceAccount {pod.spec.get('serviceAccountName')}"


def _probe_problems(pod: Pod) -> Iterator[str]:
    for container in pod.spec["containers"]:
        ports = {port["name"] for port in container.get("ports", [])}
        if ports and not {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys():
            yield f"{pod.where}: {container['name']} listens, and not all three probes look at it"
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            request = container.get(kind, {}).get("httpGet")
            if request is None:
                continue
            if isinstance(request["port"], str) and request["port"] not in ports:
                yield f"{pod.where}: {kind} of {container['name']} asks port {request['port']}, which it has not"
            if kind == "livenessProbe" and request["path"] == "/ready":
                yield f"{pod.where}: {container['name']} is ended when others are not ready"


def _drain_problems(pod: Pod) -> Iterator[str]:
    """What a pod may take to end is longer than its drain."""
    for container in pod.spec["containers"]:
        words = [*container.get("args", []), *_stop_command(container)]
        drains = [float(word.partition("=")[2]) for word in words if word.startswith("--drain-timeout-s=")]
        pause = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        if drains and pod.spec.get("terminationGracePeriodSeconds", 30) < max(drains) + pause + 10:
            yield f"{pod.where}: {container['name']} is killed before its drain can end"


def _stop_command(container: Document) -> list[str]:
    command: list[str] = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
    return command


def _selector_problems(document: Document, found: Sequence[Pod]) -> Iterator[str]:
    spec = document.get("spec", {})
    selectors = []
    match document["kind"]:
        case "Service":
            selectors = [{"matchLabels": spec["selector"]}]
        case "Deployment":
            labels = spec["template"]["metadata"]["labels"]
            if not selects(spec["selector"], labels):
                yield f"{name_of(document)} does not select its own pods"
        case "PodDisruptionBudget" | "PodMonitor":
            selectors = [spec["selector"]]
        case "NetworkPolicy":
            peers = [peer for rule in spec.get("ingress", []) for peer in rule.get("from", [])]
            peers += [peer for rule in spec.get("egress", []) for peer in rule.get("to", [])]
            own = [peer["podSelector"] for peer in peers if "podSelector" in peer and "namespaceSelector" not in peer]
            selectors = [spec["podSelector"], *own]
    for pod in found:
        for constraint in pod.spec.get("topologySpreadConstraints", []):
            if not selects(constraint["labelSelector"], pod.labels):
                yield f"{pod.where}: topologySpreadConstraints do not select its own pods"
    for selector in selectors:
        if not any(selects(selector, pod.labels) for pod in found):
            yield f"{name_of(document)} selects no pod with {selector}"


def _service_problems(service: Document, found: Sequence[Pod]) -> Iterator[str]:
    for pod in found:
        if selects({"matchLabels": service["spec"]["selector"]}, pod.labels):
            for port in service["spec"]["ports"]:
                if port["targetPort"] not in [*pod.ports, *pod.ports.values()]:
                    yield f"{name_of(service)}: {pod.where} has no port {port['targetPort']}"


def _budget_problems(budget: Document, found: Sequence[Pod]) -> Iterator[str]:
    replicas = sum(pod.replicas for pod in found if selects(budget["spec"]["selector"], pod.labels))
    if budget["spec"].get("minAvailable", 0) > replicas:
        yield f"{name_of(budget)} wants more than the {replicas} pods that there are"
    if budget["spec"].get("maxUnavailable") == 0:
        yield f"{name_of(budget)} lets no node ever be emptied"


def _autoscaler_problems(scaler: Document, documents: Sequence[Document]) -> Iterator[str]:
    target = scaler["spec"]["scaleTargetRef"]
    found = [it for it in documents if name_of(it) == f"{target['kind']} {target['name']}"]
    if not found or found[0]["apiVersion"] != target["apiVersion"]:
        yield f"{name_of(scaler)}: there is no {target['kind']} {target['name']}"
        return
    if "replicas" in found[0]["spec"]:
        yield f"{name_of(scaler)}: {target['name']} says its replicas too, which each upgrade would set back"
    if scaler["spec"]["minReplicas"] > scaler["spec"]["maxReplicas"]:
        yield f"{name_of(scaler)}: minReplicas is larger than maxReplicas"
    for container in found[0]["spec"]["template"]["spec"]["containers"]:
        if "cpu" not in container.get("resources", {}).get("requests", {}):
            yield f"{name_of(scaler)}: {container['name']} requests no cpu that a share could be of"


def worker_ports(documents: Sequence[Document]) -> range:
    """--worker-ports of the fleet's flags, empty without."""
    for document in documents:
        words = document.get("data", {}).get("fleet.flags", "").split() if document["kind"] == "ConfigMap" else []
        if "--worker-ports" in words:
            low, high = words[words.index("--worker-ports") + 1].split("-")
            return range(int(low), int(high) + 1)
    return range(0)


def _policy_problems(policy: Document, documents: Sequence[Document], found: Sequence[Pod]) -> Iterator[str]:
    """Ports that are opened have somebody who listens, and both ends of a way are open."""
    concerned = [pod for pod in found if selects(policy["spec"]["podSelector"], pod.labels)]
    workers = worker_ports(documents)
    for rule in policy["spec"].get("ingress", []):
        for port in rule.get("ports", []):
            listening = {number for pod in concerned for number in pod.ports.values()}
            opened = range(port["port"], port.get("endPort", port["port"]) + 1)
            if opened != workers and not set(opened) <= listening:
                yield f"{name_of(policy)}: nothing listens on {port['port']}"
    for rule in policy["spec"].get("egress", []):
        for peer in rule.get("to", []):
            if "podSelector" not in peer or "namespaceSelector" in peer:
                continue
            for target in (pod for pod in found if selects(peer["podSelector"], pod.labels)):
                for port in rule.get("ports", []):
                    if not any(_lets_in(target, pod, port, documents) for pod in concerned):
                        yield f"{name_of(policy)}: {target.where} lets nobody from there in at {port['port']}"


def _lets_in(target: Pod, source: Pod, port: Document, documents: Sequence[Document]) -> bool:
    for policy in documents:
        if policy["kind"] == "NetworkPolicy" and selects(policy["spec"]["podSelector"], target.labels):
            for rule in policy["spec"].get("ingress", []):
                known = any(
                    selects(peer["podSelector"], source.labels) for peer in rule["from"] if "podSelector" in peer
                )
                if known and (not rule.get("ports") or port in rule["ports"]):
                    return True
    return False
