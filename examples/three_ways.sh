#!/usr/bin/env bash
# SFT, EBFT and RLVR from the same start, by the same evaluation, on two CPU cores:
#
#   bash examples/three_ways.sh [--smoke] [--output DIR]
#
# Makes questions whose answers are Python expressions, and pretrains a small model on answers of which a part is wrong.
# Then fine-tunes it in three ways on other questions: SFT and EBFT on their right answers, RLVR on the verdicts of a
# verifier. table.txt compares the three and the start on held-out questions. examples/README.md tells what to expect.
#
#   --smoke   a few steps of everything: shows that it runs, not that it learns
#   --output  folder for the data, checkpoints, TensorBoard files (tensorboard --logdir DIR), table.txt and curves.png
#             (default: outputs/three-ways at the repository's root; with --smoke: outputs/three-ways-smoke)
#
# Run it again to continue where it stopped: it skips complete stages and resumes training.
# To start over, or after you change a setting below, remove the output folder.
# PYTHON, MCORE and TORCH choose versions; tools/venv.sh describes them.
set -Eeuo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

smoke=false output=""
read_options "smoke" "output" "$@"
if $smoke; then
  : "${output:=$REPO/outputs/three-ways-smoke}"
  ranks=1 hidden=32 pretrain_steps=2 steps=2 samples=2 longest=4
else
  : "${output:=$REPO/outputs/three-ways}"
  hidden=128 pretrain_steps=400 steps=60 samples=4 longest=40
fi

begin "1/5 Installing"
install

begin "2/5 Questions, answers and tokenizer"
make_data three_ways_data.py
for split in pretrain train valid; do
  preprocess "$split" --question-key prompt --answer-key completion --keep-keys answer \
    --questions-output "$data/$split-questions.jsonl" --seq-length 256 --ebft-stride 4
done

# evaluated FOLDER STEPS FLAGS...: train, with the same evaluation in every mode.
evaluated() {
  train "$@" --ebft-answer-only --ebft-document-mask --global-batch-size 8 --micro-batch-size 4 --eval-iters 2 \
    --ebft-eval-questions "$data/valid-questions.jsonl" --ebft-verifier exact --ebft-verifier-workers 1 \
    --ebft-max-new-tokens "$longest" --ebft-eval-samples "$samples" --ebft-pass-at 1 "$samples" --ebft-rollout-rows 256
}

begin "3/5 Pretraining on answers of which 60 % are wrong"
evaluated "$output/start" "$pretrain_steps" --training-mode sft --train-data-path "$data/pretrain_text_document" \
  --num-layers 4 --hidden-size "$hidden" --num-attention-heads 4 --init-method-std 0.05 \
  --lr 3e-3 --lr-decay-style cosine --eval-interval "$pretrain_steps" --log-interval 20

# way MODE FLAGS...: fine-tune the start. Its features measure CFM in every mode.
way() {
  evaluated "$output/$1" "$steps" --training-mode "$1" --use-checkpoint-args --pretrained-checkpoint "$output/start" \
    --ebft-encoder-load "$output/start" --ebft-rollout-length 8 --ebft-stride 4 --ebft-eval-length 8 \
    --lr 3e-4 --lr-warmup-fraction 0.1 --eval-interval 30 "${@:2}"
}

begin "4/5 SFT, EBFT and RLVR"
way sft --train-data-path "$data/train_text_document"
way ebft --train-data-path "$data/train_text_document" --ebft-temperature 1.0
# 16 questions a step, and the same 16 rows of evaluation.
way rlvr --ebft-questions "$data/train-questions.jsonl" --ebft-rlvr-num-samples 8 --global-batch-size 16 --eval-iters 1

begin "5/5 Table"
"$python" "$REPO/tools/compare_runs.py" "$output"/{start,sft,ebft,rlvr} --output "$output/curves.png" \
  | tee "$output/table.txt"
echo "Done in $SECONDS s: $output/table.txt, $output/curves.png. All curves: tensorboard --logdir $output"
