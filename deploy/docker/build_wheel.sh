#!/bin/sh
# Builds LoRAFleet's wheel, with the kernels for every instruction set.
#
#   build_wheel.sh SOURCE TOOLS OUT
#
# SOURCE is a writable copy of the tree, TOOLS the lock file of the build tools, OUT the folder for the wheel. Needs a
# C++ compiler and Python 3.11 with venv.
set -eu
source=$1 tools=$2 out=$3

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
python="$scratch/venv/bin/python"
"$python" -m pip install --disable-pip-version-check --no-cache-dir --quiet --require-hashes --requirement "$tools"

# It prints the tag that says which glibc the kernels need. -P: import nothing from the current folder.
platform=$("$python" -P "$source/kernels/build.py")
# Without isolation: otherwise pip fetches the build tools of pyproject.toml, unlocked.
"$python" -P -m build --wheel --no-isolation "-C--build-option=--plat-name=$platform" --outdir "$out" "$source"
