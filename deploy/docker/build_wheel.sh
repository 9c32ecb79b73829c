#!/bin/sh
# Makes LoRAFleet's wheel, with the kernels of every instruction set in it.
#
#   build_wheel.sh SOURCE TOOLS OUT
#
# SOURCE is a copy of the tree that may be written to, TOOLS the lock file of what builds wheels, OUT where the wheel
# comes to lie. Needs a C++ compiler and Python 3.11 with venv.
set -eu
source=$1 tools=$2 out=$3

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
python="$scratch/venv/bin/python"
"$python" -m pip install --disable-pip-version-check --no-cache-dir --quiet --require-hashes --requirement "$tools"

# It prints the tag that says which glibc the kernels need. -P: nothing is to be imported from where this runs.
platform=$("$python" -P "$source/kernels/build.py")
# Without isolation, or pip would fetch the build tools that pyproject.toml names, whatever their version and content.
"$python" -P -m build --wheel --no-isolation "-C--build-option=--plat-name=$platform" --outdir "$out" "$source"
