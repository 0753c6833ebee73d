#!/usr/bin/env bash
# Energy-Based Fine-Tuning from scratch on two CPU cores, beside SFT, in about 10 minutes:
#
#   bash examples/quickstart.sh [--seeds "1 2 3"] [--smoke] [--output DIR]
#
# Makes a virtual environment and trains a small model that writes a date ("Tuesday, May 7, 1985 = ") in any of twenty
# languages. Then teaches it one of them, Italian, in three ways from the same start: by SFT, by EBFT's loss alone
# (γ = 0), and by EBFT with a little cross entropy (γ = 0.1). Compares them on days that no training has seen.
# examples/README.md tells what to expect.
#
#   --seeds   train each way once for each seed (default: "1 2 3")
#   --smoke   a few steps of everything, in about a minute: shows that it runs, not that it learns
#   --output  folder for the data, checkpoints, TensorBoard files (tensorboard --logdir DIR), report.txt, results.json and
#             curves.png (default: outputs/quickstart at the repository's root; with --smoke: outputs/quickstart-smoke)
#
# Run it again to continue where it stopped: it skips complete stages and resumes training.
# To start over, or after you change a setting below, remove the output folder.
# PYTHON, MCORE and TORCH choose versions; tools/venv.sh describes them.
set -Eeuo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../tools/venv.sh"

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

seeds="1 2 3" smoke=false output=""
while (($#)); do
  case "$1" in
    --smoke) smoke=true ;;
    --seeds | --output)
      if [[ -z "${2:-}" ]]; then
        echo "error: $1: needs a value" >&2
        exit 2
      fi
      declare "${1#--}=$2"
      shift
      ;;
    -h | --help)
      usage
      exit 0
      ;;
    *)
      echo "error: $1: unknown option; see --help" >&2
      exit 2
      ;;
  esac
  shift
done
if [[ ! "$seeds" =~ ^[0-9]+(\ +[0-9]+)*$ ]]; then
  echo "error: --seeds '$seeds': must be numbers separated by spaces" >&2
  exit 2
fi

if $smoke; then
  : "${output:=$REPO/outputs/quickstart-smoke}"
  seeds="${seeds%% *}" ce_coefs=0.1 layers=4 hidden=64 heads=2 start_steps=6 steps=2 eval_iters=1 questions=8
else
  : "${output:=$REPO/outputs/quickstart}"
  ce_coefs="0 0.1" layers=4 hidden=128 heads=4 start_steps=400 steps=30 eval_iters=2 questions=100
fi
mkdir -p "$output"
output="$(cd "$output" && pwd -P)"

stage=""
begin() {
  stage="$1"
  printf '\n=== %s (%d s so far)\n' "$stage" "$SECONDS"
}
trap 'echo "error: stage $stage failed; the reason is above" >&2' ERR

# steps_done FOLDER: print the steps of its latest checkpoint; 0 if there is none. Only digits are taken from the file:
# arithmetic would run whatever else it holds.
steps_done() {
  local file="$1/latest_checkpointed_iteration.txt" text=""
  [[ ! -f "$file" ]] || read -r text <"$file" || true # the file has no newline
  [[ "$text" =~ ^[0-9]{1,15}$ ]] || text=0
  echo "$((10#$text))"
}

# train FOLDER STEPS FLAGS...: train to STEPS on two data-parallel ranks; continue if FOLDER has a checkpoint.
train() {
  local folder="$1" steps="$2"
  shift 2
  if (($(steps_done "$folder") >= steps)); then
    echo "complete: $folder"
    return
  fi
  "$python" -m torch.distributed.run --standalone --nproc-per-node 2 -m megatron_ebft.train \
    --save "$folder" --load "$folder" --train-iters "$steps" \
    --tokenizer-type SentencePieceTokenizer --tokenizer-model "$data/tokenizer.model" \
    --valid-data-path "$data/valid_text_document" --data-cache-path "$data/cache" --seq-length 256 \
    --ebft-document-mask --ebft-answer-only --global-batch-size 8 --micro-batch-size 4 --eval-iters "$eval_iters" "$@"
}

begin "1/6 Installing"
venv="$(default_venv)"
ensure_venv "$venv" dev
python="$venv/bin/python" data="$output/data"
export PATH="$venv/bin:$PATH"
export OMP_NUM_THREADS=1       # one core per rank
export CUDA_VISIBLE_DEVICES="" # CPU only: the model is small, and two ranks need two GPUs
export PYTHONWARNINGS=ignore   # Megatron-Core warns about optional accelerators

begin "2/6 Text and tokenizer"
if [[ -f "$data/tokenizer.model" ]]; then
  echo "complete: $data"
else
  "$python" "$REPO/examples/quickstart_data.py" "$data"
fi

begin "3/6 Preprocessing"
head -n "$questions" "$data/valid.jsonl" >"$data/questions.jsonl"
preprocess() {
  local split="$1"
  if [[ -f "$data/${split}_text_document.idx" ]]; then # written last
    echo "complete: $data/${split}_text_document"
  else
    "$python" "$REPO/tools/preprocess_data.py" --input "$data/$split.jsonl" --output-prefix "$data/$split" \
      --question-key prompt --answer-key answer --tokenizer-type SentencePieceTokenizer \
      --tokenizer-model "$data/tokenizer.model"
  fi
}
pids=()
for split in start finetune valid; do
  preprocess "$split" &
  pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done

begin "4/6 The start: SFT on twenty languages"
# Small batches and a high learning rate learn the most in a few minutes. Initial weights of 0.05 suit this width.
train "$output/start" "$start_steps" --training-mode sft --train-data-path "$data/start_text_document" \
  --num-layers "$layers" --hidden-size "$hidden" --num-attention-heads "$heads" --init-method-std 0.05 \
  --lr 4e-3 --lr-decay-style cosine --eval-interval 250 --log-interval 20 --save-interval 250

begin "5/6 Fine-tuning on Italian"
# The same rows, learning rate and number of steps for all. Temperature 1, not the paper's 0.6: CFM and answers are
# measured at temperature 1. The start is the encoder that measures CFM, for SFT as well.
finetune() {
  local folder="$output/$1" seed="$2"
  shift 2
  echo "${folder##*/}"
  folders+=("$folder")
  train "$folder" "$steps" --train-data-path "$data/finetune_text_document" --seed "$seed" \
    --pretrained-checkpoint "$output/start" --ebft-encoder-load "$output/start" --use-checkpoint-args \
    --ebft-rollout-length 8 --ebft-stride 4 --ebft-context-length 8 --ebft-num-samples 4 --ebft-temperature 1.0 \
    --lr 3e-4 --lr-decay-style constant --eval-interval "$((steps / 2))" --ebft-eval-length 8 --save-interval 20 \
    --ebft-eval-questions "$data/questions.jsonl" --ebft-verifier exact --ebft-eval-samples 3 --ebft-max-new-tokens 40 "$@"
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
