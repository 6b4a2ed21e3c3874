#!/bin/bash
# All GPU tests and benchmarks on a bare machine, within 9 minutes and without a network; one table at the end.
# usage: run/gpu_checks.sh [OUT]
# Needs Python with PyTorch, Triton, timm and pytest; what else it lacks is taken from wheels/*.whl, and nothing is
# installed outside OUT (runs/gpu_checks), where logs, figures and a picture go, and benchmarks.md for
# docs/benchmarks.md. Rewrites kernels/attention_table.json by what it measures. PYTHON names another interpreter.
# Exit status: 0, 1 if a part failed, 2 if there is no GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=$(realpath -m "${1:-runs/gpu_checks}")
mkdir -p "$out/site/mug"
for folder in model data kernels run; do ln -sfn "$PWD/$folder" "$out/site/mug/$folder"; done
export PYTHONPATH="$out/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
table=() failed=0

# part NAME SECONDS COMMAND...: runs it, its output in OUT/NAME.log; its last line goes to the table
part() {
  local name=$1 limit=$2 begin=$SECONDS verdict=PASS status last
  shift 2
  echo "$name: at most $limit s"
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  last=$(grep -v '^[[:space:]]*$' "$out/$name.log" | tail -n 1)
  if [ $status -ne 0 ]; then
    verdict=FAIL failed=1
    tail -n 25 "$out/$name.log"
    [ $status -eq 124 ] && last="stopped at $limit s; $last"
  fi
  table+=("$(printf '%-8s %s %4d s  %s' "$name" "$verdict" $((SECONDS - begin)) "$last")")
}

if compgen -G "wheels/*.whl" >/dev/null; then
  part wheels 25 "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$out/site" wheels/*.whl
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_checks.sh: $python finds no GPU (or no PyTorch) on this machine: nothing was checked" >&2
  exit 2
fi
# Most of the tests' time goes into compiling kernels, which several processes share.
workers=$("$python" -c 'import xdist' 2>/dev/null && echo "-n $(($(nproc) < 12 ? $(nproc) : 12))")
part tests 150 "$python" -m pytest -q -m gpu -p no:cacheprovider $workers tests/kernels tests/model
part kernels 175 "$python" run/bench_kernels.py --seconds 0.05 --write-table --json "$out/kernels.jsonl" --png "$out/kernels.png"
part losses 70 "$python" run/bench_kernels.py --op model_step --preset base --batch 64 --steps 50 --json "$out/losses.jsonl"
part speed 60 "$python" run/bench_model.py --json "$out/speed.jsonl"
part compiled 55 "$python" run/bench_model.py --preset base --compile --json "$out/compiled.jsonl"
cp kernels/attention_table.json "$out/"
"$python" -m mug.run.benchmarks.markdown $(ls "$out"/*.jsonl 2>/dev/null) >"$out/benchmarks.md" || failed=1

echo
printf '%s\n' "${table[@]}"
exit $failed
