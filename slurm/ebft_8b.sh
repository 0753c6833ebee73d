#!/usr/bin/env bash
# EBFT of Llama 3.1 8B on 4 nodes of 8 H100: tensor 2 × data 16, 41 GiB a GPU (tools/plan.py).
#
#   sbatch slurm/ebft_8b.sh [training flags]      for example: RUN=checkpoints/try sbatch slurm/ebft_8b.sh --lr 2e-6
#
# The job saves, requeues itself and goes on until --train-iters are done: slurm/README.md. Flags after the script are
# appended to those below, and the later of two wins. The settings, and those of the cluster in lib.sh, can be given in
# the environment of sbatch, and #SBATCH lines as its options. On nodes without GPUs: --gpus-per-node=0.
#SBATCH --job-name=ebft_8b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# USR1 to this script, so long before the time limit (SLURM may be 30 s early): longer than a step and a save together,
# and the limit must leave time to start before it.
#SBATCH --signal=B:USR1@600
set -euo pipefail

# sbatch runs a copy of this file elsewhere, so the repository is where it was submitted from, or EBFT_REPO.
REPO="${EBFT_REPO:-${SLURM_SUBMIT_DIR:-$PWD}}"
if [[ ! -f "$REPO/slurm/lib.sh" ]]; then
  echo "error: $REPO is not the repository of megatron_ebft: submit from its root, or set EBFT_REPO to it" >&2
  exit 64
fi

# Settings. Relative paths are the repository's.
BASE="${BASE:-checkpoints/llama-3.1-8b}" # where the policy starts, made by slurm/convert.sh
ENCODER="${ENCODER:-$BASE}"              # the frozen model of the features; the base model, where BASE was fine-tuned
DATA="${DATA:-data/text_text_document}"  # a dataset's prefix, made by tools/preprocess_data.py
RUN="${RUN:-checkpoints/ebft-8b}"        # checkpoints, TensorBoard and logs; what is there already is continued

source "$REPO/slurm/lib.sh"
train_until_done \
  --use-checkpoint-args --pretrained-checkpoint "$BASE" --ebft-encoder-load "$ENCODER" --save "$RUN" --load "$RUN" \
  --data-path "$DATA" --train-iters 10000 --global-batch-size 16 --seq-length 1024 \
  --save-interval 20 --async-save --ebft-keep-checkpoints 2 --eval-interval 250 \
  --tensor-model-parallel-size 2 --sequence-parallel --bf16 --recompute-granularity full --overlap-grad-reduce \
  "$@"
