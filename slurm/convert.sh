#!/usr/bin/env bash
# Convert from or to Hugging Face on the CPUs of one node. Takes all flags of the tools in tools/convert/:
#
#   sbatch slurm/convert.sh hf_to_megatron --hf-model path/to/Llama-3.1-8B --output checkpoints/llama-3.1-8b --verify
#   sbatch slurm/convert.sh megatron_to_hf --load checkpoints/ebft-8b --output path/to/published --verify
#
# The output appears at the end, complete. A conversion that was cut off starts over when it is submitted again.
#SBATCH --job-name=convert
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
set -euo pipefail

# sbatch runs a copy of this file from another folder. So the repository is the folder of submission, or EBFT_REPO.
REPO="${EBFT_REPO:-${SLURM_SUBMIT_DIR:-$PWD}}"
if [[ ! -f "$REPO/slurm/lib.sh" ]]; then
  echo "error: $REPO is not the repository of megatron_ebft: submit from its root, or set EBFT_REPO to it" >&2
  exit 64
fi

# Settings, besides the cluster settings of lib.sh.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-8}}" # --verify computes on these cores

source "$REPO/slurm/lib.sh"
case "${1:-}" in
  hf_to_megatron | megatron_to_hf) ;;
  *) give_up "$WRONG" "the first argument must be hf_to_megatron or megatron_to_hf, not '${1:-}'" ;;
esac
in_environment
srun "${launch[@]}" "$PYTHON" "tools/convert/$1.py" "${@:2}"
