#!/usr/bin/env bash
# Tests the job scripts of slurm/ on a real SLURM that runs here, as root: bash tests/slurm/run.sh [pytest arguments]
# Makes the virtual environment as tests/run.sh does. SLURM's programs must be there: tests/slurm/cluster.sh.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../../tools/venv.sh"
venv="$(default_venv)"
ensure_venv "$venv" dev

export OMP_NUM_THREADS=1
cd "$REPO"
exec "$venv/bin/python" -m pytest tests/slurm/jobs.py "$@"
