"""Kubernetes manifests rendered by Helm and Kustomize, and the pods they create."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import yaml

KUBERNETES = Path(__file__).parents[1] / "deploy" / "kubernetes"
CHART = KUBERNETES / "chart"
OVERLAY = KUBERNETES / "cpu-demo"
RELEASE = NAMESPACE = "lorafleet"
SETS = tuple(sorted(file.stem for file in (KUBERNETES / "values").glob("*.yaml")))

Manifest = dict[str, Any]


class RenderError(Exception):
    """Helm refuses the values; its message."""


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod that will run, or several alike."""

    name: str
    labels: dict[str, str]  # those that KubeRay adds among them
    spec: dict[str, Any]
    num_replicas: int  # at least

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]


def helm() -> str:
    """Return the program of the package helm-binary, else the one on PATH."""
    try:
        package = distribution("helm-binary")
    except PackageNotFoundError:
        found = shutil.which("helm")
        assert found, "helm is missing; the development dependencies have it (helm-binary)"
        return found
    names = {"helm", "helm.exe"}
    (program,) = (package.locate_file(file) for file in package.files or () if file.name in names)
    return str(program)


def render(values: str, settings: Sequence[str] = (), *, release: str = RELEASE) -> str:
    """Return the manifests of a value set, as text. settings: `key=value`, for --set. Raises RenderError."""
    command = [helm(), "template", release, str(CHART), "--namespace", NAMESPACE]
    command += ["--values", str(KUBERNETES / "values" / f"{values}.yaml")]
    command += [f"--set={setting}" for setting in settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise RenderError(done.stderr)
    return done.stdout


@functools.cache
def rendered(values: str) -> str:
    return render(values)


def kustomized() -> str:
    """Return the manifests of the overlay, as text. Needs kubectl."""
    command = ["kubectl", "kustomize", str(OVERLAY)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def read(text: str) -> list[Manifest]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C is ten times faster
    return [manifest for manifest in yaml.load_all(text, Loader=loader) if manifest]


def of_kind(manifests: Sequence[Manifest], *kinds: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def pods(manifests: Sequence[Manifest]) -> Iterator[Pod]:
    for manifest in manifests:
        name, spec = manifest["metadata"]["name"], manifest.get("spec", {})
        if manifest["kind"] == "Deployment":
            template = spec["template"]
            yield Pod(name, template["metadata"]["labels"], template["spec"], spec.get("replicas", 1))
        elif manifest["kind"] == "RayCluster":
            for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
                template, group_name = group["template"], group.get("groupName", "headgroup")
                is_head = group is spec["headGroupSpec"]
                added = {
                    "ray.io/cluster": name,
                    "ray.io/node-type": "head" if is_head else "worker",
                    "ray.io/group": group_name,
                }
                yield Pod(
                    f"{name}-{group_name}",
                    template["metadata"]["labels"] | added,
                    template["spec"],
                    group.get("replicas", 1),
                )


def as_pods(manifests: Sequence[Manifest]) -> list[Manifest]:
    """Return the manifests, each with a namespace, and a RayCluster's pods for tools that do not know RayClusters."""
    extracted: list[Manifest] = []
    for manifest in manifests:
        manifest = manifest | {"metadata": {"namespace": NAMESPACE} | manifest["metadata"]}
        extracted.append(manifest)
        if manifest["kind"] == "RayCluster":
            extracted += [
                {
                    "apiVersion": "v1",
                    "kind": "Pod",
                    "metadata": {"name": pod.name, "namespace": NAMESPACE, "labels": pod.labels},
                    "spec": pod.spec,
                }
                for pod in pods([manifest])
            ]
    return extracted


if __name__ == "__main__":
    OVERLAY.joinpath("rendered.yaml").write_text(render("cpu-demo"))
    print(f"wrote {OVERLAY / 'rendered.yaml'}", file=sys.stderr)
