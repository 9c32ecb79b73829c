#!/bin/sh
# Installs into a virtual environment, which is created if it is missing.
#
#   install.sh VENV LOCK.txt   the packages of a lock file, each against its hash
#   install.sh VENV DIRECTORY  the one wheel in it, nothing else
#
# Two calls, so that the packages, which are large and seldom change, are an image layer of their own.
set -eu
venv=$1 what=$2

[ -e "$venv" ] || python3 -m venv "$venv"
pip() {
    "$venv/bin/python" -m pip --disable-pip-version-check --no-cache-dir "$@"
}
if [ -d "$what" ]; then
    # The glob matches one wheel: pip refuses a second one of the same name.
    pip install --no-index --no-deps "$what"/*.whl
    pip check
else
    pip install --require-hashes --requirement "$what"
fi
