# shellcheck shell=bash
# Shell functions of the examples. A script sources this file, reads its options, sets `output`, and calls `install`.

source "$(dirname "${BASH_SOURCE[0]}")/../tools/venv.sh"

ranks=2       # of `train`, data-parallel
use_gpu=false # whether ranks may use GPUs

# usage: print the comment at the head of the script.
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[-1]}"; }

# read_options "SWITCH..." "OPTION..." ARGUMENTS...: set the variable of each switch to true, of each option to its
# value. The variable of --hf-model is hf_model.
read_options() {
  local switches=" $1 " options=" $2 " name
  shift 2
  while (($#)); do
    if [[ "$1" == -h || "$1" == --help ]]; then
      usage
      exit 0
    elif [[ "$1" == --* && "$switches" == *" ${1#--} "* ]]; then
      declare -g "${1#--}=true"
    elif [[ "$1" == --* && "$options" == *" ${1#--} "* ]]; then
      if [[ -z "${2:-}" ]]; then
        echo "error: $1: needs a value" >&2
        exit 2
      fi
      name="${1#--}"
      declare -g "${name//-/_}=$2"
      shift
    else
      echo "error: $1: unknown option; see --help" >&2
      exit 2
    fi
    shift
  done
}

# check_seeds SEEDS: end the script unless these are different numbers.
check_seeds() {
  if [[ ! "$1" =~ ^(0|[1-9][0-9]*)(\ +(0|[1-9][0-9]*))*$ ]]; then
    echo "error: --seeds '$1': must be numbers separated by spaces" >&2
    exit 2
  fi
  if [[ -n "$(tr -s ' ' '\n' <<<"$1" | sort | uniq -d)" ]]; then
    echo "error: --seeds '$1': names a seed twice; leave one out" >&2
    exit 2
  fi
}

stage="options"
begin() {
  stage="$1"
  printf '\n=== %s (%d s so far)\n' "$stage" "$SECONDS"
}
trap 'echo "error: stage $stage failed; the reason is above" >&2' ERR

# install: make the folder `output` and the virtual environment; set `python`, `data`, `tokenizer` (flags), and the
# environment of ranks.
install() {
  local venv
  mkdir -p "$output"
  output="$(cd "$output" && pwd -P)"
  venv="$(default_venv)"
  ensure_venv "$venv" dev
  python="$venv/bin/python" data="$output/data"
  tokenizer=(--tokenizer-type SentencePieceTokenizer --tokenizer-model "$data/tokenizer.model")
  export PATH="$venv/bin:$PATH"
  export OMP_NUM_THREADS=1     # one core per rank
  export PYTHONWARNINGS=ignore # Megatron-Core warns about optional accelerators
  if ! $use_gpu; then
    export CUDA_VISIBLE_DEVICES="" # most models here are small, and two ranks need two GPUs
  fi
}

# make_data SCRIPT: text and tokenizer, by a Python script of this folder. Its last file is tokenizer.model.
make_data() {
  if [[ -f "$data/tokenizer.model" ]]; then
    echo "complete: $data"
  else
    "$python" "$REPO/examples/$1" "$data"
  fi
}

# preprocess SPLIT FLAGS...: the dataset of a split.
preprocess() {
  local split="$1"
  shift
  if [[ -f "$data/${split}_text_document.idx" ]]; then # written last
    echo "complete: $data/${split}_text_document"
  else
    "$python" "$REPO/tools/preprocess_data.py" --input "$data/$split.jsonl" --output-prefix "$data/$split" \
      "${tokenizer[@]}" "$@"
  fi
}

# steps_done FOLDER: print the steps of its latest checkpoint; 0 if there is none. Only digits are taken from the file:
# arithmetic would run whatever else it holds.
steps_done() {
  local file="$1/latest_checkpointed_iteration.txt" text=""
  [[ ! -f "$file" ]] || read -r text <"$file" || true # the file has no newline
  [[ "$text" =~ ^[0-9]{1,15}$ ]] || text=0
  echo "$((10#$text))"
}

# train FOLDER STEPS FLAGS...: train to STEPS on all ranks; continue if FOLDER has a checkpoint.
train() {
  local folder="$1" steps="$2"
  shift 2
  if (($(steps_done "$folder") >= steps)); then
    echo "complete: $folder"
    return
  fi
  "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" -m megatron_ebft.train \
    --save "$folder" --load "$folder" --train-iters "$steps" "${tokenizer[@]}" \
    --valid-data-path "$data/valid_text_document" --data-cache-path "$data/cache" --seq-length 256 "$@"
}
