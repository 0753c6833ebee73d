#!/usr/bin/env bash
# Runs the tests, from a fresh machine: bash tests/run.sh [pytest arguments]
#
# Makes a virtual environment at the repository's root (.venv, or one named after the versions where MCORE pins them),
# installs the project there and runs pytest in one process per core. Returns pytest's exit code.
# Versions: the variables PYTHON, MCORE and TORCH, described in tools/venv.sh. For example:
#   PYTHON=python3.12 MCORE=0.19.2 bash tests/run.sh -k layout
# WORKERS=0 runs everything in one process, for a debugger.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../tools/venv.sh"
venv="$(default_venv)"
ensure_venv "$venv" dev

cores="$(nproc)"
workers="${WORKERS:-$((cores < 8 ? cores : 8))}" # more would have no files left to run
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"   # the tests start several ranks at once on tensors of a few kilobytes
cd "$REPO"
exec "$venv/bin/python" -m pytest --numprocesses="$workers" "$@"
