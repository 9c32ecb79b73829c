"""Runs checkov over the rendered chart and overlay: `check_manifests.py CHECKOV`, the path of the program.

checkov does not know RayClusters, so their pods are added to them. Exits with 1 for a failed check that neither
deploy/kubernetes/checkov.yaml nor the list below explains.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from manifests import KUBERNETES, SETS, as_pods, kustomized, read, rendered

HEADS_EXCEPTIONS = {
    # For its container `fleet`, which serves nothing: it ends with the fleet or Ray, and Kubernetes starts it again.
    # A test checks that all others have probes.
    "CKV_K8S_8": "no liveness probe",
    "CKV_K8S_9": "no readiness probe",
}


def main(checkov: str) -> int:
    texts = {name: rendered(name) for name in SETS}
    if shutil.which("kubectl"):
        texts["overlay"] = kustomized()
    with tempfile.TemporaryDirectory() as folder:
        for name, text in texts.items():
            manifests = as_pods(read(text))
            for manifest in manifests:
                if manifest["kind"] == "Pod" and manifest["metadata"]["labels"]["ray.io/node-type"] == "head":
                    manifest["metadata"]["annotations"] = {
                        f"checkov.io/skip{number}": f"{check}={why}"
                        for number, (check, why) in enumerate(HEADS_EXCEPTIONS.items())
                    }
            (Path(folder) / f"{name}.yaml").write_text(yaml.safe_dump_all(manifests))
        command = [checkov, "--directory", folder, "--config-file", str(KUBERNETES / "checkov.yaml")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    print(done.stdout, done.stderr, sep="", end="")
    # It prints no summary, and succeeds, if it has found nothing to check.
    if "Passed checks:" not in done.stdout:
        print("checkov has checked nothing", file=sys.stderr)
        return 1
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
