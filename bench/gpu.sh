#!/usr/bin/env bash
# bench/gpu.sh [quick|full] [--out DIR]: prove the GPU kernels right on this machine's GPU, then measure them.
#
# Needs a python3 with torch, triton, numpy, pytest and hypothesis (PYTHON names another one), for the CUDA kernels nvcc, cmake and
# pybind11, and no network. Everything is built and run in a scratch folder; DIR (default bench/results) gets
# gpu-<name>-<date>.json, .jsonl and .md and what the tests and builds said: at most eight files. A part that fails, hangs or dies
# is noted and the rest goes on; the list comes last. quick takes at most 4 minutes, full 9.
# Status: 0 all held, 1 something failed, 2 wrong use, 3 no GPU to run on.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
mode=full out=$root/bench/results

usage() { echo "usage: bench/gpu.sh [quick|full] [--out DIR]" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case $1 in
    quick|full) mode=$1; shift ;;
    --out) [ $# -ge 2 ] || usage; out=$2; shift 2 ;;
    *) usage ;;
  esac
done

command -v "$python" > /dev/null || { echo "gpu.sh: $python was not found; name a Python with PYTHON=..." >&2; exit 3; }
reason=$("$python" - <<'PY'
import importlib.util as found

missing = [name for name in ("torch", "triton", "pytest", "hypothesis", "numpy") if found.find_spec(name) is None]
if missing:
    print(f"this Python lacks {', '.join(missing)}")
else:
    import torch

    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no GPU")
PY
) || reason="$python does not run"
if [ -n "$reason" ]; then
  echo "gpu.sh: nothing can be measured here: $reason; run it on a machine with a GPU" >&2
  exit 3
fi

mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
scratch=$(mktemp -d "${TMPDIR:-/tmp}/qupedkern-gpu.XXXXXX") || exit 2
trap 'rm -rf "$scratch"' EXIT
cp -r "$root"/{qupedkern,fl,bench,tests,csrc,pyproject.toml,CMakeLists.txt} "$scratch"/ || exit 2
rm -f "$scratch"/qupedkern/_C_* "$scratch"/qupedkern/_build_info.json # of another machine, perhaps
export QUPEDKERN_COMMIT=${QUPEDKERN_COMMIT:-$(git -C "$root" describe --always --dirty=+ 2> /dev/null || echo unknown)}
export TRITON_CACHE_DIR=$scratch/triton PYTHONDONTWRITEBYTECODE=1
unset TRITON_INTERPRET QUPEDKERN_BACKEND
cd "$scratch" && "$python" -m bench.gpu "$mode" --out "$out"
