#!/usr/bin/env bash
# Energy-Based Fine-Tuning from scratch on two CPU cores, beside SFT, in about 10 minutes, 3 of them to install:
#
#   bash examples/quickstart.sh [--seeds "1 2 3"] [--smoke] [--output DIR]
#
# Makes a virtual environment and trains a small model that writes a date ("Tuesday, May 7, 1985 = ") in any of twenty
# languages. Then teaches it one of them, Italian, in three ways from the same start: by SFT, by EBFT's loss alone
# (γ = 0), and by EBFT with a little cross entropy (γ = 0.1). Compares them on days that no training has seen.
# examples/README.md tells what to expect.
#
#   --seeds   train each way once for each seed (default: "1 2 3")
#   --smoke   a few steps of everything, in a minute and a half: shows that it runs, not that it learns
#   --output  folder for the data, checkpoints, TensorBoard files (tensorboard --logdir DIR), report.txt, results.json
#             and curves.png (default: outputs/quickstart at the repository's root; with --smoke: outputs/quickstart-smoke)
#
# Run it again to continue where it stopped: it skips complete stages and resumes training.
# To start over, or after you change a setting below, remove the output folder.
# PYTHON, MCORE and TORCH choose versions; tools/venv.sh describes them.
set -Eeuo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

seeds="1 2 3" smoke=false output=""
read_options "smoke" "seeds output" "$@"
check_seeds "$seeds"

if $smoke; then
  : "${output:=$REPO/outputs/quickstart-smoke}"
  ranks=1 seeds="${seeds%% *}" ce_coefs=0.1 layers=4 hidden=64 heads=2 start_steps=6 steps=2 eval_iters=1 questions=8
else
  : "${output:=$REPO/outputs/quickstart}"
  ce_coefs="0 0.1" layers=4 hidden=128 heads=4 start_steps=350 steps=24 eval_iters=2 questions=100
fi

begin "1/6 Installing"
install

begin "2/6 Text and tokenizer"
make_data quickstart_data.py

begin "3/6 Preprocessing"
head -n "$questions" "$data/valid.jsonl" >"$data/questions.jsonl"
pids=()
for split in start finetune valid; do
  preprocess "$split" --question-key prompt --answer-key answer &
  pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done

# Only answers count, and documents do not see each other.
rows=(--ebft-document-mask --ebft-answer-only --global-batch-size 8 --micro-batch-size 4 --eval-iters "$eval_iters")

begin "4/6 The start: SFT on twenty languages"
# Small batches and a high learning rate learn the most in a few minutes. Initial weights of 0.05 suit this width.
train "$output/start" "$start_steps" "${rows[@]}" --training-mode sft --train-data-path "$data/start_text_document" \
  --num-layers "$layers" --hidden-size "$hidden" --num-attention-heads "$heads" --init-method-std 0.05 \
  --lr 4e-3 --lr-decay-style cosine --eval-interval 350 --log-interval 20 --save-interval 175

begin "5/6 Fine-tuning on Italian"
# The same rows, learning rate and number of steps for all. Temperature 1, not the paper's 0.6: CFM and answers are
# measured at temperature 1. The start is the encoder that measures CFM, for SFT as well.
finetune() {
  local folder="$output/$1" seed="$2"
  shift 2
  echo "${folder##*/}"
  folders+=("$folder")
  train "$folder" "$steps" "${rows[@]}" --train-data-path "$data/finetune_text_document" --seed "$seed" \
    --pretrained-checkpoint "$output/start" --ebft-encoder-load "$output/start" --use-checkpoint-args \
    --ebft-rollout-length 8 --ebft-stride 4 --ebft-context-length 8 --ebft-num-samples 4 --ebft-temperature 1.0 \
    --lr 3e-4 --lr-decay-style constant --eval-interval "$((steps / 2))" --ebft-eval-length 8 --save-interval 12 \
    --ebft-eval-questions "$data/questions.jsonl" --ebft-verifier exact --ebft-eval-samples 3 \
    --ebft-max-new-tokens 40 "$@"
}
folders=()
for seed in $seeds; do
  finetune "sft-seed$seed" "$seed" --training-mode sft
  for ce_coef in $ce_coefs; do
    finetune "ebft-$ce_coef-seed$seed" "$seed" --training-mode ebft --ebft-ce-coef "$ce_coef"
  done
done

begin "6/6 Report"
"$python" "$REPO/examples/quickstart_report.py" "${folders[@]}" --questions "$data/questions.jsonl" --output "$output"
for file in report.txt results.json curves.png; do
  [[ -s "$output/$file" ]]
done
echo "Done in $SECONDS s: $output/report.txt, results.json, curves.png. All curves: tensorboard --logdir $output"
