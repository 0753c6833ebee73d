#!/usr/bin/env bash
# A sweep of EBFT over the grid of the paper: γ × α × whitening, 27 points, as a job array of one node each.
#
#   sbatch slurm/sweep.sh [training flags]                 all points
#   sbatch --array=0-8%3 slurm/sweep.sh [training flags]   those without whitening, three at a time
#   python tools/compare_runs.py checkpoints/sweep         afterwards, or meanwhile
#
# Each point is a run like slurm/ebft_1b.sh's, with checkpoints, logs, restarts and an ending of its own. Point i of the
# lists below, the first changing fastest: γ i mod 3, α i / 3 mod 3, whitening i / 9.
#SBATCH --job-name=ebft_sweep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --array=0-26
#SBATCH --output=%x-%A_%a.out
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
BASE="${BASE:-checkpoints/llama-3.2-1b}"   # where the policy starts, made by slurm/convert.sh
ENCODER="${ENCODER:-$BASE}"                # the frozen model of the features; the base model, where BASE was fine-tuned
DATA="${DATA:-data/text_text_document}"    # a dataset's prefix, made by tools/preprocess_data.py
SWEEP="${SWEEP:-checkpoints/sweep}"        # a folder for each point; what is there already is continued
read -ra gammas <<<"${GAMMAS:-0 0.03 0.1}" # --ebft-ce-coef
read -ra alphas <<<"${ALPHAS:-0 0.5 1}"    # --ebft-diversity-coef
read -ra whitenings <<<"${WHITENINGS:-none paper released}"

point="${SLURM_ARRAY_TASK_ID:-0}"
points=$((${#gammas[@]} * ${#alphas[@]} * ${#whitenings[@]}))
if ((point >= points)); then
  echo "error: --array: there is no point $point, the last is $((points - 1))" >&2
  exit 64
fi
gamma="${gammas[point % ${#gammas[@]}]}"
alpha="${alphas[point / ${#gammas[@]} % ${#alphas[@]}]}"
whitening="${whitenings[point / (${#gammas[@]} * ${#alphas[@]})]}"
RUN="$SWEEP/ce$gamma-diversity$alpha-$whitening"

source "$REPO/slurm/lib.sh"
train_until_done \
  --use-checkpoint-args --pretrained-checkpoint "$BASE" --ebft-encoder-load "$ENCODER" --save "$RUN" --load "$RUN" \
  --data-path "$DATA" --train-iters 2000 --global-batch-size 16 --seq-length 1024 \
  --save-interval 100 --async-save --ebft-keep-checkpoints 2 --eval-interval 500 \
  --bf16 --recompute-granularity full --overlap-grad-reduce \
  --ebft-ce-coef "$gamma" --ebft-diversity-coef "$alpha" --ebft-whitening "$whitening" \
  "$@"
