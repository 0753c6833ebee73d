#!/usr/bin/env bash
# A sweep of EBFT over the paper's grid γ × α × whitening: a job array of 27 points, one node each.
#
#   sbatch slurm/sweep.sh [training flags]                 all points
#   sbatch --array=0-8%3 slurm/sweep.sh [training flags]   only the points without whitening, three at a time
#   python tools/compare_runs.py checkpoints/sweep         compare the runs, also while they train
#
# Each point is a run like that of slurm/ebft_1b.sh, with its own checkpoints, logs and restarts. Point i takes from
# the lists below γ number i mod #γ, α number i / #γ mod #α and whitening number i / (#γ · #α).
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
BASE="${BASE:-checkpoints/llama-3.2-1b}"   # the starting policy, made by slurm/convert.sh
ENCODER="${ENCODER:-$BASE}"                # the frozen encoder; the base model if BASE is fine-tuned
DATA="${DATA:-data/text_text_document}"    # prefix of a dataset made by tools/preprocess_data.py
SWEEP="${SWEEP:-checkpoints/sweep}"        # a folder for each point; existing runs are continued
read -ra gammas <<<"${GAMMAS:-0 0.03 0.1}" # --ebft-ce-coef
read -ra alphas <<<"${ALPHAS:-0 0.5 1}"    # --ebft-diversity-coef
read -ra whitenings <<<"${WHITENINGS:-none paper released}"

point="${SLURM_ARRAY_TASK_ID:-0}"
points=$((${#gammas[@]} * ${#alphas[@]} * ${#whitenings[@]}))
if ((point >= points)); then
  echo "error: --array: there is no point $point; the last one is $((points - 1))" >&2
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
  --bf16 --recompute-granularity full --overlap-grad-reduce --log-throughput \
  --ebft-ce-coef "$gamma" --ebft-diversity-coef "$alpha" --ebft-whitening "$whitening" \
  "$@"
