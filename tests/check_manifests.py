"""Has checkov look at what the chart renders. Run by `make manifests-check`; the other checks are in tests/deploy.

    python tests/check_manifests.py CHECKOV

CHECKOV is its program: it lives in an environment of its own, since it pins much that we do not. It knows no
RayCluster, so the pods of one are put beside it as Pods.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from manifests import KUBERNETES, pods, render

VALUE_SETS = sorted(path.stem for path in (KUBERNETES / "values").glob("*.yaml"))


def write(folder: Path, values: str) -> None:
    """The documents of a value set, and the pods of its RayCluster."""
    documents = render(values, "--namespace", "fleet")
    for pod in pods(documents):
        if pod.where.startswith("RayCluster"):
            name = pod.where.rpartition(" ")[2]
            metadata = {"name": name, "namespace": "fleet", "labels": dict(pod.labels)}
            documents.append({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod.spec})
    for document in documents:
        document["metadata"]["namespace"] = "fleet"
    (folder / f"{values}.yaml").write_text(yaml.safe_dump_all(documents))


def main() -> None:
    (checkov,) = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="lorafleet-manifests-") as name:
        for values in VALUE_SETS:
            write(Path(name), values)
        command = [checkov, "--config-file", str(KUBERNETES / "checkov.yaml"), "--directory", name, "--skip-download"]
        sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
