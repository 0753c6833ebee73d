#!/usr/bin/env bash
# SmolLM2-135M-Instruct learns to write Python functions: SFT and EBFT from the same start, on a GPU or two CPU cores:
#
#   bash examples/smollm2.sh --hf-model DIR [--smoke] [--seeds "1 2 3"] [--steps N] [--output DIR]
#
# Data are functions of installed packages: from signature and docstring to the statements. Some packages are held out.
# Evaluations before, in the middle and in the end measure cross entropy, CFM and edit similarity on functions of
# held-out packages. HumanEval compares the start and the models that are exported to Hugging Face in the end; its
# programs run in the sandbox of the verifier `code`. examples/README.md tells what to expect.
#
#   --hf-model  Hugging Face folder of the model, for example of HuggingFaceTB/SmolLM2-135M-Instruct
#   --smoke     a few steps of everything on 64 tokens, on the CPU: shows that it runs, not that it learns
#   --seeds     train each way once for each seed (default: "1 2 3" on a GPU, else "1")
#   --steps     steps of EBFT; SFT takes five times as many, about as many operations (default: 200 on a GPU, else 20)
#   --output    folder for data, checkpoints, Hugging Face exports, TensorBoard files (tensorboard --logdir DIR),
#               table.txt, results.json and curves.png (default: outputs/smollm2 at the repository's root; with --smoke:
#               outputs/smollm2-smoke)
#
# On a GPU, the seeds train side by side: a model of this size leaves most of it idle.
# Run it again to continue where it stopped: it skips complete stages and resumes training.
# To start over, or after you change --steps, --hf-model or a setting below, remove the output folder.
# PYTHON, MCORE and TORCH choose versions; tools/venv.sh describes them.
set -Eeuo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

hf_model="" smoke=false seeds="" steps="" output=""
read_options "smoke" "hf-model seeds steps output" "$@"
if [[ ! -f "$hf_model/config.json" ]]; then
  echo "error: --hf-model '$hf_model': has no config.json; name a Hugging Face folder of the model" >&2
  exit 2
fi
hf_model="$(cd "$hf_model" && pwd -P)"
[[ -z "$seeds" ]] || check_seeds "$seeds"
if [[ ! "$steps" =~ ^([1-9][0-9]{0,8})?$ ]]; then
  echo "error: --steps '$steps': must be a number above 0" >&2
  exit 2
fi

if $smoke; then
  : "${output:=$REPO/outputs/smollm2-smoke}"
else
  : "${output:=$REPO/outputs/smollm2}"
  use_gpu=true
fi

begin "1/7 Installing"
install
has_gpu="$("$python" -c 'import torch; print(str(torch.cuda.is_available()).lower())')"
if $smoke; then
  : "${seeds:=1}" "${steps:=2}"
  sft_factor=1 ranks=1 row=64 rows=2 micro=2 eval_iters=1 characters=200 modules=5 functions=2 tasks=2 samples=2
  longest=8 together=64 lr=5e-5 precision=()
elif $has_gpu; then
  : "${seeds:=1 2 3}" "${steps:=200}"
  sft_factor=5 ranks=1 row=512 rows=16 micro=4 eval_iters=4 characters=1500 modules=2000 functions=200 tasks=164
  samples=10 longest=256 together=1024 lr=2e-5 precision=(--bf16)
else
  : "${seeds:=1}" "${steps:=20}"
  sft_factor=5 row=256 rows=2 micro=1 eval_iters=2 characters=600 modules=100 functions=16 tasks=20 samples=10
  longest=64 together=64 lr=5e-5
  precision=() # CPUs without bf16 instructions multiply bf16 numbers up to 100 times slower
fi
tokenizer=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$hf_model")
# The verifier of the edit similarity, and what the report reads.
export PYTHONPATH="$REPO/examples:$REPO/tools${PYTHONPATH:+:$PYTHONPATH}"

begin "2/7 Functions of packages, and HumanEval"
if [[ -f "$data/humaneval.jsonl" ]]; then # written last
  echo "complete: $data"
else
  "$python" "$REPO/examples/smollm2_data.py" "$data" --longest "$characters" --modules "$modules"
fi
head -n "$tasks" "$data/humaneval.jsonl" >"$data/tasks.jsonl"
for split in train valid; do
  preprocess "$split" --question-key prompt --answer-key answer --keep-keys answer \
    --questions-output "$data/$split-questions.jsonl" --seq-length "$row"
done
head -n "$functions" "$data/valid-questions.jsonl" >"$data/functions.jsonl"

begin "3/7 Conversion"
start="$output/start"
if [[ -f "$start/latest_checkpointed_iteration.txt" ]]; then # written last
  echo "complete: $start"
else
  "$python" "$REPO/tools/convert/hf_to_megatron.py" --hf-model "$hf_model" --output "$start" --verify
fi

# each_seed COMMAND...: run it with each seed as its last argument; on a GPU with all at the same time.
each_seed() {
  local seed pid pids=() failed=0
  for seed in $seeds; do
    "$@" "$seed" &
    pids+=("$!")
    $has_gpu || wait "$!" || failed=1
  done
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  return "$failed"
}

# way NAME STEPS FLAGS... SEED: fine-tune the start; evaluate before, in the middle and in the end.
way() {
  local folder="$output/$1-seed${*: -1}" steps="$2" half="$((($2 + 1) / 2))"
  echo "${folder##*/}"
  train "$folder" "$steps" "${@:3:$#-3}" --seed "${*: -1}" --use-checkpoint-args --pretrained-checkpoint "$start" \
    --train-data-path "$data/train_text_document" --ebft-document-mask --ebft-answer-only --seq-length "$row" \
    --global-batch-size "$rows" "${precision[@]}" --lr "$lr" --lr-warmup-fraction 0.1 --save-interval "$half" \
    --eval-interval "$half" --eval-iters "$eval_iters" --ebft-encoder-load "$start" --ebft-eval-length 8 \
    --ebft-eval-questions "$data/functions.jsonl" --ebft-verifier edit_similarity:ratio --ebft-verifier-workers 1 \
    --ebft-max-new-tokens "$longest" --ebft-rollout-rows "$together" --ebft-stop "${stops[@]}"
}
# Top-level code after a function ends a completion, as in HumanEval's paper.
stops=($'\ndef' $'\nclass' $'\nif' $'\nprint' $'\n#' $'\n@' $'\n```')

begin "4/7 SFT"
each_seed way sft "$((sft_factor * steps))" --training-mode sft --micro-batch-size "$((rows / ranks))"

begin "5/7 EBFT"
# The paper's settings for code, γ included: G = s = c = 8, n = 4, τ = 0.6.
each_seed way ebft "$steps" --training-mode ebft --ebft-ce-coef 0.1 --micro-batch-size "$micro"

# humaneval NAME FOLDER: HumanEval of the Hugging Face model in FOLDER.
humaneval() {
  local results="$output/humaneval/$1.json"
  if [[ -f "$results" ]]; then
    echo "complete: $results"
    return
  fi
  "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" "$REPO/tools/evaluate.py" \
    --hf-model "$2" "${precision[@]}" --questions "$data/tasks.jsonl" --verifier code --num-samples "$samples" \
    --temperature 0.6 --pass-at 1 "$samples" --max-new-tokens "$longest" --rows "$together" --stop "${stops[@]}" \
    --json "$results"
}

# published NAME SEED: the Hugging Face model of a run's last checkpoint, and its HumanEval.
published() {
  local run="$1-seed$2"
  if [[ ! -d "$output/huggingface/$run" ]]; then
    "$python" "$REPO/tools/convert/megatron_to_hf.py" --load "$output/$run" --output "$output/huggingface/$run" --verify
  fi
  humaneval "$run" "$output/huggingface/$run"
}

begin "6/7 Export and HumanEval"
mkdir -p "$output"/{huggingface,humaneval}
humaneval start "$hf_model"
each_seed published sft
each_seed published ebft

begin "7/7 Report"
"$python" "$REPO/examples/smollm2_report.py" "$output" | tee "$output/table.txt"
for file in table.txt results.json curves.png; do
  [[ -s "$output/$file" ]]
done
echo "Done in $SECONDS s: $output/table.txt, results.json, curves.png. All curves: tensorboard --logdir $output"
