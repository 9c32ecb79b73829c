"""Faults in manifests that schemas do not see: unknown names, selectors that select nothing, pods that are too open.

Owns: checks of manifests against each other. Leaves to others: types and fields (manifest_schemas.py), connections
between pods (network_policies.py), agreement with the code (tests/deploy/test_kubernetes.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from manifests import Manifest, Pod, of_kind, pods
from network_policies import may_talk, selects

WITHOUT_PROBES = {"fleet", "demo-model"}
"""`lorafleet up` serves nothing, and ends when it has nothing to follow; the other ends by itself."""
GRACE_S = 30  # what pods get beyond their drain


def problems(manifests: Sequence[Manifest]) -> list[str]:
    checks = (
        _names,
        _selectors,
        _volumes,
        _secrets,
        _ports,
        _probes,
        _drains,
        _scaling,
        _disruption,
        _network,
        _security,
        _resources,
        _ray,
    )
    return [problem for check in checks for problem in check(manifests)]


def _names(manifests: Sequence[Manifest]) -> Iterator[str]:
    counted = Counter((manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests)
    for (kind, name), count in counted.items():
        if count > 1:
            yield f"{kind} {name} is there {count} times"
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name):
            yield f"{kind} {name} is no name"
    for cluster in of_kind(manifests, "RayCluster"):
        if len(cluster["metadata"]["name"]) > 50:
            yield "the RayCluster's name is too long for what KubeRay adds to it"


def _selectors(manifests: Sequence[Manifest]) -> Iterator[str]:
    there = list(pods(manifests))
    for manifest in manifests:
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        if kind == "Deployment":
            labels = manifest["spec"]["template"]["metadata"]["labels"]
            if not selects(manifest["spec"]["selector"], labels):
                yield f"Deployment {name} does not select its own pods"
        for what, selector in _pod_selectors(manifest):
            if not any(selects(selector, pod.labels) for pod in there):
                yield f"{what} of {kind} {name} selects no pod"
        if kind == "ServiceMonitor":
            services = [
                service
                for service in of_kind(manifests, "Service")
                if selects(manifest["spec"]["selector"], service["metadata"]["labels"])
            ]
            ports = {port["name"] for service in services for port in service["spec"]["ports"]}
            if not services:
                yield f"ServiceMonitor {name} selects no Service"
            for endpoint in manifest["spec"]["endpoints"]:
                if services and endpoint["port"] not in ports:
                    yield f"ServiceMonitor {name} asks for the port {endpoint['port']}, which its Service has not"
    for pod in there:
        for constraint in pod.spec.get("topologySpreadConstraints", ()):
            if not selects(constraint["labelSelector"], pod.labels):
                yield f"{pod.name} is spread by labels that it has not"


def _pod_selectors(manifest: Manifest) -> Iterator[tuple[str, dict[str, Any]]]:
    kind, spec = manifest["kind"], manifest.get("spec", {})
    if kind == "Service":
        yield "the selector", {"matchLabels": spec["selector"]}
    elif kind == "PodDisruptionBudget":
        yield "the selector", spec["selector"]
    elif kind == "NetworkPolicy":
        yield "the selector", spec["podSelector"]
        for rule in (*spec.get("ingress", ()), *spec.get("egress", ())):
            for peer in (*rule.get("from", ()), *rule.get("to", ())):
                if "podSelector" in peer and "namespaceSelector" not in peer:
                    yield "a peer", peer["podSelector"]


def _volumes(manifests: Sequence[Manifest]) -> Iterator[str]:
    config_maps = {manifest["metadata"]["name"] for manifest in of_kind(manifests, "ConfigMap")}
    for pod in pods(manifests):
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", ())}
        if len(volumes) != len(pod.spec.get("volumes", ())):
            yield f"{pod.name} has two volumes of one name"
        mounted = set()
        for container in pod.containers:
            mounts = container.get("volumeMounts", ())
            where = f"{pod.name}/{container['name']}"
            for mount in mounts:
                mounted.add(mount["name"])
                if mount["name"] not in volumes:
                    yield f"{where} mounts {mount['name']}, which is no volume of the pod"
            for path, count in Counter(mount["mountPath"] for mount in mounts).items():
                if count > 1:
                    yield f"{where} mounts {count} volumes at {path}"
        for name in volumes.keys() - mounted:
            yield f"{pod.name} has the volume {name}, which no container mounts"
        for name, volume in volumes.items():
            wanted = volume.get("configMap", {}).get("name")
            if wanted is not None and wanted not in config_maps:
                yield f"{pod.name}: the volume {name} is of the ConfigMap {wanted}, which is not there"
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                yield f"{pod.name}: the volume {name} has no bound"
            if volume.get("secret", {}).get("defaultMode", 0o440) != 0o440:
                yield f"{pod.name}: the Secret in {name} may be read by more than its group"


def _secrets(manifests: Sequence[Manifest]) -> Iterator[str]:
    accounts = {manifest["metadata"]["name"] for manifest in of_kind(manifests, "ServiceAccount")}
    clusters = {manifest["metadata"]["name"] for manifest in of_kind(manifests, "RayCluster")}
    for pod in pods(manifests):
        if pod.spec.get("serviceAccountName") not in accounts:
            yield f"{pod.name} has the account {pod.spec.get('serviceAccountName')}, which is not there"
        for container in pod.containers:
            where = f"{pod.name}/{container['name']}"
            for variable in container.get("env", ()):
                if "secretKeyRef" in variable.get("valueFrom", {}):
                    yield f"{where} has a Secret in {variable['name']}; a file does not show in its environment"
            if container["name"] == "fleet":
                yield from _ray_token(where, pod, container, clusters)


def _ray_token(where: str, pod: Pod, container: dict[str, Any], clusters: set[str]) -> Iterator[str]:
    """Check the token: KubeRay gives it to Ray's containers; others that join Ray must take it from the same Secret."""
    environment = {variable["name"]: variable.get("value") for variable in container["env"]}
    token = PurePosixPath(environment.get("RAY_AUTH_TOKEN_PATH") or "/")
    volumes = {volume["name"]: volume.get("secret", {}).get("secretName") for volume in pod.spec["volumes"]}
    mounted = {volumes.get(name) for name in _mounted_at(container, str(token.parent))}
    if environment.get("RAY_AUTH_MODE") != "token" or token.name != "auth_token" or not mounted & clusters:
        yield f"{where} cannot join Ray: it has not the token that KubeRay makes"


def _names_of(container: dict[str, Any], what: str) -> set[str]:
    return {entry["name"] for entry in container.get(what, ())}


def _ports(manifests: Sequence[Manifest]) -> Iterator[str]:
    there = list(pods(manifests))
    for pod in there:
        declared = [port for container in pod.containers for port in container.get("ports", ())]
        for field in ("name", "containerPort"):
            for value, count in Counter(port[field] for port in declared).items():
                if count > 1:
                    yield f"{pod.name} has the port {value} {count} times"
        for container in pod.containers:
            for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
                port = container.get(kind, {}).get("httpGet", {}).get("port")
                if port is not None and port not in _names_of(container, "ports"):
                    yield f"{pod.name}/{container['name']}: its {kind} asks the port {port}, which it has not"
    for service in of_kind(manifests, "Service"):
        name = service["metadata"]["name"]
        targets = {port["targetPort"] for port in service["spec"]["ports"]}
        for pod in there:
            if selects({"matchLabels": service["spec"]["selector"]}, pod.labels):
                for target in targets.difference(*(_names_of(container, "ports") for container in pod.containers)):
                    yield f"Service {name} leads to the port {target}, which {pod.name} has not"


def _probes(manifests: Sequence[Manifest]) -> Iterator[str]:
    for pod in pods(manifests):
        for container in pod.containers:
            where = f"{pod.name}/{container['name']}"
            kinds = {kind for kind in ("startupProbe", "livenessProbe", "readinessProbe") if kind in container}
            if container["name"] in WITHOUT_PROBES:
                continue
            if len(kinds) < 3:
                yield f"{where} lacks a probe"
                continue
            live, ready = (container[kind]["httpGet"]["path"] for kind in ("livenessProbe", "readinessProbe"))
            if "http" in _names_of(container, "ports") and live == ready:
                yield f"{where} would be restarted because there is no worker: liveness and readiness ask the same"


def _drains(manifests: Sequence[Manifest]) -> Iterator[str]:
    for pod in pods(manifests):
        for container in pod.spec["containers"]:
            hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
            serves = {"http", "worker"} & _names_of(container, "ports")
            if serves and not hook:
                yield f"{pod.name}/{container['name']} has no preStop, so that it ends in the middle of requests"
            words = [*container.get("command", ()), *container.get("args", ()), *(hook or ())]
            (*_, drain_s) = [0, *(int(word.split("=")[1]) for word in words if word.startswith("--drain-timeout-s="))]
            grace_s = pod.spec["terminationGracePeriodSeconds"]
            if grace_s < drain_s + GRACE_S:
                yield f"{pod.name} is ended after {grace_s} s, but may drain for {drain_s} s"


def _scaling(manifests: Sequence[Manifest]) -> Iterator[str]:
    deployments = {manifest["metadata"]["name"]: manifest for manifest in of_kind(manifests, "Deployment")}
    for scaler in of_kind(manifests, "HorizontalPodAutoscaler"):
        name, target = scaler["metadata"]["name"], scaler["spec"]["scaleTargetRef"]
        deployment = deployments.get(target["name"]) if target["kind"] == "Deployment" else None
        if deployment is None:
            yield f"HorizontalPodAutoscaler {name} scales {target['kind']} {target['name']}, which is not there"
            continue
        if "replicas" in deployment["spec"]:
            yield f"Deployment {target['name']} has a number of replicas, to which each upgrade would return"
        for container in deployment["spec"]["template"]["spec"]["containers"]:
            if "cpu" not in container["resources"].get("requests", {}):
                yield f"HorizontalPodAutoscaler {name} cannot tell the CPU use of {container['name']}"
        if scaler["spec"]["minReplicas"] > scaler["spec"]["maxReplicas"]:
            yield f"HorizontalPodAutoscaler {name} has minReplicas above maxReplicas"


def _disruption(manifests: Sequence[Manifest]) -> Iterator[str]:
    least = {
        scaler["spec"]["scaleTargetRef"]["name"]: scaler["spec"]["minReplicas"]
        for scaler in of_kind(manifests, "HorizontalPodAutoscaler")
    }
    there = list(pods(manifests))
    for budget in of_kind(manifests, "PodDisruptionBudget"):
        name, spec = budget["metadata"]["name"], budget["spec"]
        selected = [pod for pod in there if selects(spec["selector"], pod.labels)]
        num_pods = sum(least.get(pod.name, pod.num_replicas) for pod in selected)
        of_ray = any("ray.io/cluster" in pod.labels for pod in selected)
        if of_ray and not isinstance(spec.get("minAvailable"), int):
            yield f"PodDisruptionBudget {name} would let no pod go: a RayCluster cannot be asked how many it has"
        elif spec.get("minAvailable", 0) >= num_pods or num_pods == 1:
            yield f"PodDisruptionBudget {name} would never let a pod go"


def _network(manifests: Sequence[Manifest]) -> Iterator[str]:
    policies = of_kind(manifests, "NetworkPolicy")
    if not policies:
        return
    there = list(pods(manifests))
    for pod in there:
        if not any(
            {"Ingress", "Egress"} <= set(policy["spec"]["policyTypes"])
            and selects(policy["spec"]["podSelector"], pod.labels)
            for policy in policies
        ):
            yield f"{pod.name} is under no NetworkPolicy that denies what is not named"
    yield from _declared(policies, there)
    by_part = {pod.labels["app.kubernetes.io/component"]: pod for pod in there}
    for what, source, target, port, wanted in _flows(manifests, by_part):
        if may_talk(policies, source, target, port) != wanted:
            yield f"{what} {'cannot' if wanted else 'can'} be reached at {port}"


def _declared(policies: Sequence[Manifest], there: Sequence[Pod]) -> Iterator[str]:
    """Check that ports opened by policies are declared by the pods; of a range only the first."""
    for policy in policies:
        selected = [pod for pod in there if selects(policy["spec"]["podSelector"], pod.labels)]
        declared = {
            port["containerPort"]
            for pod in selected
            for container in pod.containers
            for port in container.get("ports", ())
        }
        for rule in policy["spec"].get("ingress", ()):
            for port in rule.get("ports", ()):
                if port["port"] not in declared:
                    name = policy["metadata"]["name"]
                    yield f"NetworkPolicy {name} opens {port['port']}, which no container of its pods has"


def _flows(manifests: Sequence[Manifest], part: dict[str, Pod]) -> Iterator[tuple[str, Pod | None, Pod, int, bool]]:
    """Return (what, from, to, port, whether it must be allowed)."""
    if "server" in part:
        yield "a single pod's Ray", None, part["server"], 6379, False
        return
    head, worker, gateway = part["head"], part["worker"], part["gateway"]
    first, last = worker_ports(manifests)
    yield "the controller", gateway, head, 50050, True
    for port in (first, last):
        yield "a worker", gateway, worker, port, True
        yield "a worker from outside", None, worker, port, False
    yield "the controller from outside", None, head, 50050, False
    yield "Ray's head from a gateway", gateway, head, 6379, False
    yield "a worker's other ports from a gateway", gateway, worker, last + 1, False
    yield "a gateway from a worker", worker, gateway, 22, False
    for source, target in ((head, worker), (worker, head), (worker, worker)):
        for port in (6379, 10002, 61000):
            yield "a pod of Ray from another", source, target, port, True


def worker_ports(manifests: Sequence[Manifest]) -> tuple[int, int]:
    """Return the workers' ports from the fleet's flags."""
    (flags,) = of_kind(manifests, "ConfigMap")
    found = re.search(r"--worker-ports (\d+)-(\d+)", flags["data"]["fleet.flags"])
    assert found, "without them the workers' ports cannot be opened"
    return int(found[1]), int(found[2])


def _security(manifests: Sequence[Manifest]) -> Iterator[str]:
    for pod in pods(manifests):
        context = pod.spec.get("securityContext", {})
        if not (context.get("runAsNonRoot") is True and context.get("runAsUser", 0) >= 10000):
            yield f"{pod.name} may run as root"
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{pod.name} has no seccomp profile"
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.name} gets a token for Kubernetes' API"
        for container in pod.containers:
            own = container.get("securityContext", {})
            if not (
                own.get("readOnlyRootFilesystem") is True
                and own.get("allowPrivilegeEscalation") is False
                and own.get("capabilities", {}).get("drop") == ["ALL"]
            ):
                yield f"{pod.name}/{container['name']} may do more than it needs"
            writable = [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
            for path in ("/tmp", "/home/lorafleet"):
                if path not in writable:
                    yield f"{pod.name}/{container['name']} cannot write to {path}"


def _resources(manifests: Sequence[Manifest]) -> Iterator[str]:
    for pod in pods(manifests):
        for container in pod.containers:
            resources = container.get("resources", {})
            limits = resources.get("limits", {})
            if not {"cpu", "memory"} <= limits.keys() or resources.get("requests") != limits:
                yield f"{pod.name}/{container['name']} has no bound, or asks for less than it may take"


def _ray(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Check what KubeRay refuses or ignores beyond its schema, and what the fleet needs of Ray."""
    for cluster in of_kind(manifests, "RayCluster"):
        spec, head = cluster["spec"], cluster["spec"]["headGroupSpec"]
        for group in spec["workerGroupSpecs"]:
            if not group["minReplicas"] == group["replicas"] == group["maxReplicas"]:
                yield f"nothing scales the worker group {group['groupName']}, but its bounds say so"
        ray_head, *others = head["template"]["spec"]["containers"]
        if ray_head["name"] != "ray-head":
            yield "KubeRay would start Ray in the container that comes first, which is not Ray's"
        if spec.get("authOptions", {}).get("mode") != "token" or not spec.get("rayVersion"):
            yield "Ray asks for no token"
        if head["rayStartParams"].get("include-dashboard") != "false":
            yield "Ray's dashboard is open"
        for fleet in others:
            if not head["template"]["spec"].get("shareProcessNamespace"):
                yield f"{fleet['name']} cannot join Ray: it does not see its processes"
            for path in ("/tmp", "/dev/shm"):
                if _mounted_at(fleet, path) != _mounted_at(ray_head, path):
                    yield f"{fleet['name']} does not share {path} with Ray"
        yield from _room(manifests, cluster)


def _mounted_at(container: dict[str, Any], path: str) -> list[str]:
    return [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == path]


def _room(manifests: Sequence[Manifest], cluster: Manifest) -> Iterator[str]:
    """Check that the pods have room for the flags' ranks."""
    (flags,) = of_kind(manifests, "ConfigMap")
    text = flags["data"]["fleet.flags"]
    asked = {name: re.search(rf"--{name} (\S+)", text) for name in ("num-workers", "tensor-parallel-size", "device")}
    num_workers, ranks, device = (found[1] if found else "" for found in asked.values())
    room = 0
    for group in cluster["spec"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        gpus = container["resources"]["limits"].get("nvidia.com/gpu", 0)
        held = gpus if device == "cuda" else int(group["rayStartParams"]["num-cpus"])
        room += group["replicas"] * held
    if int(num_workers) * int(ranks) > room:
        yield f"{num_workers} workers of {ranks} ranks do not fit the pods, which hold {room} ranks"
