# shellcheck shell=bash
# Shell functions that make the project's virtual environments; source this file from bash.
#
# Environment variables:
#   PYTHON  the interpreter, 3.11 or newer (default: python3)
#   MCORE   an exact megatron-core version (default: the newest one that the interpreter takes)
#   TORCH   an exact torch version, or empty for the newest one (default: the newest with an NVIDIA GPU, else 2.13.0)
# pip's own variables work as ever, for example PIP_EXTRA_INDEX_URL to prefer the small CPU builds of torch.

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"

# python_id INTERPRETER: its version and home, the same for an interpreter and for its virtual environments.
python_id() {
  "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3], sys.base_prefix)'
}

# check_python: fails, with the reason, unless PYTHON is new enough.
check_python() {
  local python="${PYTHON:-python3}" identity
  if ! identity="$(python_id "$python" 2>/dev/null)"; then
    echo "error: '$python' does not run: set PYTHON to a Python 3.11 or newer" >&2
    return 1
  fi
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: '$python' is Python ${identity%% *}: set PYTHON to a Python 3.11 or newer" >&2
    return 1
  fi
}

# default_venv: the environment's folder, .venv, or one named after the versions where MCORE pins them.
default_venv() {
  check_python || return 1
  if [[ -z "${MCORE:-}" ]]; then
    echo "$REPO/.venv"
  else
    echo "$REPO/.venv-py$("${PYTHON:-python3}" -c 'import sys; print("%d%d" % sys.version_info[:2])')-mcore$MCORE"
  fi
}

# ensure_venv DIR [EXTRAS]: a virtual environment in DIR with this project, editable, and its EXTRAS ("dev").
# Does nothing where setup.py, the interpreter and the versions asked for are as they were the last time.
ensure_venv() {
  local dir="$1" extras="${2:-}" python="${PYTHON:-python3}" torch identity key stamp
  check_python || return 1
  if nvidia-smi -L >/dev/null 2>&1; then torch="${TORCH-}"; else torch="${TORCH-2.13.0}"; fi
  identity="$(python_id "$python")" || return 1
  key="$identity; $REPO; setup.py $(cksum <"$REPO/setup.py"); megatron-core ${MCORE:-any}; torch ${torch:-any}"
  stamp="$dir/.installed" # the key, then a line for each set of extras installed under it

  if [[ "$(python_id "$dir/bin/python" 2>/dev/null)" != "$identity" ]] ||
    ! "$dir/bin/python" -c 'import pip' 2>/dev/null; then
    echo "making $dir (Python ${identity%% *})" >&2
    if ! "$python" -m venv --clear "$dir"; then
      echo "error: '$python -m venv' failed (on Debian and Ubuntu it needs the package python3-venv)" >&2
      return 1
    fi
  fi
  if [[ "$(head -n 1 "$stamp" 2>/dev/null)" != "$key" ]]; then
    rm -f "$stamp"
  elif grep -qxF "extras: $extras" "$stamp"; then
    return 0
  fi

  echo "installing megatron_ebft${extras:+[$extras]} with megatron-core ${MCORE:-newest}, torch ${torch:-newest}" >&2
  "$dir/bin/python" -m pip install -qq --disable-pip-version-check -e "$REPO${extras:+[$extras]}" \
    "megatron-core${MCORE:+==$MCORE}" "torch${torch:+==$torch}" || return 1
  [[ -f "$stamp" ]] || echo "$key" >"$stamp"
  echo "extras: $extras" >>"$stamp"
}
