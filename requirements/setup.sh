#!/usr/bin/env bash
# Makes .venv with the pinned packages and Keel itself; does nothing when that was done before.
#
#   setup.sh [cpu|gpu]      PYTHON=python3.12 picks the interpreter
#
# The stamp is written last and holds all that the environment depends on (the place, the target, the pins, pyproject.toml):
# an installation that broke off, or a directory that was moved or copied, is made again from nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$(pwd -P)
trap 'exit 130' INT TERM
venv=$root/.venv
stamp=$venv/setup-done
log=$venv/setup.log

say() { printf '%s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 2; }

# Two calls at once: the second one waits for the first.
if command -v flock >/dev/null; then exec 9<"$root"; flock 9; fi

stamped() { [ -f "$stamp" ] && sed -n "s/^$1 //p" "$stamp" || true; }
target=${1:-$(stamped target)}
target=${target:-cpu}
pins=requirements/$target.txt
[ -f "$pins" ] || die "no such target: $target (expected cpu or gpu)"

# --- Done already? ---------------------------------------------------------------------------------------------------
sums=$(cat "$pins" pyproject.toml requirements/setup.sh | sha256sum | cut -c1-64)
wanted="root $root
target $target
sums $sums"
asked=${PYTHON:+$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo none)}
usable() {  # the environment still starts, at this very place, and with the Python that was asked for
  local has
  has=$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) &&
    [ -z "$asked" -o "$asked" = "$has" ] && [ "$(stamped root)" = "$root" ] && [ "$(stamped target)" = "$target" ]
}
if usable && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi

# --- What the machine must have --------------------------------------------------------------------------------------
fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; }
if [ -n "${PYTHON:-}" ]; then
  command -v "$PYTHON" >/dev/null || die "there is no $PYTHON; Python 3.11 or 3.12 is needed"
  fits "$PYTHON" || die "Python 3.11 or 3.12 is needed, but $PYTHON is $("$PYTHON" -V 2>&1)"
  python=$PYTHON
else
  for python in python3 python3.12 python3.11 ''; do
    if [ -z "$python" ]; then
      command -v python3 >/dev/null || die "there is no python3; Python 3.11 or 3.12 is needed"
      die "Python 3.11 or 3.12 is needed, but python3 is $(python3 -V 2>&1); name another: make setup PYTHON=..."
    fi
    if fits "$python"; then break; fi
  done
fi
for tool in gcc g++; do
  command -v $tool >/dev/null || die "$tool is missing; vLLM and DeepSpeed compile kernels with it"
done
[ "$(uname -sm)" = "Linux x86_64" ] || say "note: the pins were resolved for Linux on x86-64, this is $(uname -sm)"

# --- Install ---------------------------------------------------------------------------------------------------------
start=$SECONDS
if ! usable; then
  if [ -e "$venv/pyvenv.cfg" ] && ! grep -q "^prompt = 'keel'" "$venv/pyvenv.cfg"; then
    die "$venv was not made by 'make setup'; move it out of the way first"
  fi
  rm -rf "$venv.old"
  [ ! -e "$venv" ] || mv "$venv" "$venv.old"  # so that an interrupted removal leaves nothing that looks like an environment
  rm -rf "$venv.old"
  say "making .venv with $("$python" -V)"
  "$python" -m venv --prompt keel "$venv" >"$root/.venv.log" 2>&1 || {
    cat "$root/.venv.log" >&2
    rm -rf "$venv" "$root/.venv.log"
    die "$python -m venv failed (on Debian and Ubuntu it comes with the package python3-venv)"
  }
  rm -f "$root/.venv.log"
fi
rm -f "$stamp"

: >"$log"
pip() {
  "$venv/bin/python" -m pip --disable-pip-version-check install --no-deps --no-build-isolation --no-compile \
    --progress-bar off "$@" >>"$log" 2>&1
}
failed() { tail -n 25 "$log" >&2; die "${1:-pip failed}; all of its output is in $log"; }
must() { pip "$@" || failed; }
pin() { grep -E "^$1==" "$pins" | sed 's/ .*//'; }

# pip first: the one that comes with Python 3.11 takes 30 s longer. setuptools builds DeepSpeed, which is no wheel.
must "$(pin pip)" "$(pin setuptools)"

# The CPU build of torch is not on PyPI. A machine may have its own source for it; otherwise PyTorch's index has it.
torch=$(pin torch)
if [[ $torch == *+cpu ]]; then
  say "installing $torch"
  pip "$torch" || {
    grep -q "^ERROR: No matching distribution found for torch" "$log" || failed
    say "pip's own configuration does not find it: asking PyTorch's CPU wheel index"
    must --retries 2 --timeout 15 --index-url https://download.pytorch.org/whl/cpu "$torch"
  }
fi

say "installing the $(grep -c '==' "$pins") packages of $pins (a few minutes)"
must -r "$pins"
must -e .
"$venv/bin/python" requirements/check.py "$pins"

# Byte code now and on both cores, not in every process of the first run. The import also shows that the stack fits together.
say "compiling"
export PYTHONDONTWRITEBYTECODE=
"$venv/bin/python" -m compileall -q -x '/tests?/' "$venv"/lib/python3*/site-packages/{torch,vllm,ray,deepspeed} >>"$log" 2>&1 &
"$venv/bin/python" -c 'import datasets, deepspeed, ray, transformers, vllm; from transformers import LlamaForCausalLM' >>"$log" 2>&1 || {
  failed "the packages do not import"
}
wait $! || true  # some packages ship templates that are no Python
printf '%s\n' "$wanted" >"$stamp"
say "set up in $((SECONDS - start)) s"
