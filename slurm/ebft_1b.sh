#!/usr/bin/env bash
# EBFT of Llama 3.2 1B on a node of 8 H100: data 8, 17 GiB a GPU (tools/plan.py).
#
#   sbatch slurm/ebft_1b.sh [training flags]      for example: RUN=checkpoints/try sbatch slurm/ebft_1b.sh --lr 2e-6
#
# The job saves, requeues itself and continues until --train-iters steps are done (slurm/README.md). Training flags
# after the script are appended to those below; the last one wins. Set the variables below, and the cluster settings of
# lib.sh, in sbatch's environment. Give #SBATCH lines as options of sbatch. On nodes without GPUs: --gpus-per-node=0.
#SBATCH --job-name=ebft_1b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# Seconds before the time limit at which SLURM sends USR1 to this script (it may come 30 s early). Must be longer than a
# step and a save together; --time must also leave room for the start.
#SBATCH --signal=B:USR1@600
set -euo pipefail

# sbatch runs a copy of this file from another folder. So the repository is the folder of submission, or EBFT_REPO.
REPO="${EBFT_REPO:-${SLURM_SUBMIT_DIR:-$PWD}}"
if [[ ! -f "$REPO/slurm/lib.sh" ]]; then
  echo "error: $REPO is not the repository of megatron_ebft: submit from its root, or set EBFT_REPO to it" >&2
  exit 64
fi

# Settings. Paths are relative to the repository.
BASE="${BASE:-checkpoints/llama-3.2-1b}" # the starting policy, made by slurm/convert.sh
ENCODER="${ENCODER:-$BASE}"              # the frozen encoder; the base model if BASE is fine-tuned
DATA="${DATA:-data/text_text_document}"  # prefix of a dataset made by tools/preprocess_data.py
RUN="${RUN:-checkpoints/ebft-1b}"        # checkpoints, TensorBoard and logs; an existing run is continued

source "$REPO/slurm/lib.sh"
train_until_done \
  --use-checkpoint-args --pretrained-checkpoint "$BASE" --ebft-encoder-load "$ENCODER" --save "$RUN" --load "$RUN" \
  --data-path "$DATA" --train-iters 10000 --global-batch-size 16 --seq-length 1024 \
  --save-interval 100 --async-save --ebft-keep-checkpoints 2 --eval-interval 500 \
  --bf16 --recompute-granularity full --overlap-grad-reduce --log-throughput \
  "$@"
