#!/bin/bash
# What one GPU can show in 8 minutes: whether training starts and resumes, how fast kernels and steps are, whether the
# tests pass. One table at the end.
# usage: bash run/gpu_checks.sh [--device cpu] [--seconds 480] [--work FOLDER] [RESULTS]
#
# The most valuable parts come first. Each ends by itself within its limit, is left out where too little time is left,
# and stops none of the others. RESULTS (runs/gpu_checks) gets three files. Each is replaced as a whole every few
# seconds, so that a script that is killed leaves what was known:
#   table.txt             a line a part: verdict, seconds, its last line
#   results.tgz           logs, benchmarks' rows (*.jsonl), metrics of the run, benchmarks.md for docs/benchmarks.md
#   attention_table.json  which attention is the fastest on this GPU; kernels/attention_table.json becomes the same
# All else goes to FOLDER (RESULTS.work), on the same file system: packages, runs, caches.
#
# Works without a network: Python ($PYTHON, else that of .venv, else python3) must have PyTorch >= 2.11, Triton, timm,
# transformers, pyarrow, safetensors, tokenizers, tensorboard, psutil, rich and pytest. What else is imported comes from
# gpu_bundle/, which `make gpu-bundle` collects elsewhere: wheels/ (DeepSpeed, jsonargparse, simplejpeg and what they
# import), shards/ (the embedded drawings), triton_cache/ (compiled kernels; may be left out).
#
# --device cpu is a dry run: all parts, with small sizes, and without compiling where torch.compile would.
# Exit status: 0, 1 if a part failed or reached its limit, 2 if there is no GPU or an option is wrong.
set -uo pipefail
cd "$(dirname "$0")/.."
python=python3 device=cuda seconds=480 results=runs/gpu_checks work="" child="" failed=0

[ -x .venv/bin/python ] && python=$PWD/.venv/bin/python
python=${PYTHON:-$python}

refuse() { echo "error: $1" >&2; exit 2; }

while [ $# -gt 0 ]; do
  case $1 in
    --device) device=${2:-} && shift ;;
    --seconds) seconds=${2:-} && shift ;;
    --work) work=${2:-} && shift ;;
    -*) refuse "$1 is not an option; there are --device, --seconds and --work" ;;
    *) results=$1 ;;
  esac
  shift
done
[[ $device =~ ^(cuda|cpu)$ ]] || refuse "--device $device is not one of cuda, cpu"
[[ $seconds =~ ^[1-9][0-9]*$ ]] || refuse "--seconds $seconds is not a number of seconds"
if [ "$device" = cuda ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  refuse "$python finds no GPU (or no PyTorch) on this machine: nothing was checked; --device cpu is a dry run"
fi
"$python" -c 'import torch' 2>/dev/null || refuse "$python has no PyTorch: run make .venv/.ready, or name another in PYTHON"
results=$(realpath -m "$results") work=$(realpath -m "${work:-$results.work}")
[ ! -e "$work" ] || [ -e "$work/.gpu_checks" ] || refuse "--work $work holds something else; name another folder"
rm -rf "$work"
mkdir -p "$results" "$work/site/mug" && touch "$work/.gpu_checks" || exit 2
for folder in model data kernels run; do ln -s "$PWD/$folder" "$work/site/mug/$folder"; done
unset PYTHONDONTWRITEBYTECODE # without bytecode each part would compile its libraries again
export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTORCH_ALLOC_CONF=expandable_segments:True
export TRITON_CACHE_DIR=$work/triton TORCHINDUCTOR_CACHE_DIR=$work/inductor
[ -d gpu_bundle/triton_cache ] && cp -r gpu_bundle/triton_cache "$TRITON_CACHE_DIR"
: >"$work/table.txt"

# --- What the parts are given ---
if [ "$device" = cuda ]; then
  slack=1 steps=(40 60) every=20 samples=64 presets=(base large huge)
  kernels=(--seconds 0.03) table=(--write-table)
  model=(--steps 10) step=(--preset base --batch 256 --steps 8)
  tests=(tests/kernels tests/model -m gpu -k "not (small and fp32)") # the small kernel never serves fp32
  "$python" -c 'import xdist' 2>/dev/null && tests+=(-n "$(($(nproc) < 12 ? $(nproc) : 12))" --dist worksteal)
else
  export TORCH_COMPILE_DISABLE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # threads that wait for each other take minutes
  slack=5 steps=(4 6) every=2 samples=8 presets=(tiny tiny tiny) # bf16 is slow where it is not in the hardware
  kernels=(--device cpu --seconds 0) table=()
  model=(--device cpu --batch 4 --steps 2) step=(--preset tiny --batch 4 --steps 2)
  tests=(tests/kernels/test_masked_patch_loss_triton.py -m gpu -k "two_calls or nan_in_the_image or full_counts")
fi
train=(run/pretrain.py --deepspeed ds_configs/zero3.json --config run/recipes/mug/openmoji_tiny.yaml
  --output "$work/run" --allow_changes true
  --trainer.eval_every "${steps[0]}" --trainer.eval_samples "$samples" --trainer.log_every 1
  --trainer.global_batch "$samples" --trainer.micro_batch "$samples"
  --checkpoint.every_steps "$every" --checkpoint.asynchronous true --trainer.precision bf16)
[ -d gpu_bundle/shards ] && train+=(--data.cache "$work/cache" --data.tokenizer "$PWD/gpu_bundle/shards/tokenizer.json"
  --data.shards "$PWD/gpu_bundle/shards/train-*.tar" --data.held_out "$PWD/gpu_bundle/shards/held_out-*.tar")
losses=(--contenders triton chunked reference "every patch" F.linear_cross_entropy)
attention=(--contenders triton sdpa sdpa_cudnn sdpa_flash flash_attn flash_attn_4 "${table[@]}")

# --- Parts ---
# Copy what is known so far to RESULTS: written aside, then renamed.
save() {
  local known file
  known=$(cd "$work" && ls -d table.txt ./*.log ./*.jsonl benchmarks.md run/metrics.jsonl 2>/dev/null)
  # shellcheck disable=SC2086  # names of our own, without spaces
  tar czf "$work/new" -C "$work" $known 2>/dev/null
  [ $? -le 1 ] && mv "$work/new" "$results/results.tgz" # 1: a log grew while it was read
  for file in kernels/attention_table.json "$work/table.txt"; do
    cp "$file" "$work/new" && mv "$work/new" "$results/${file##*/}"
  done
}

end_part() { [ -z "$child" ] || kill -KILL -- "-$child" 2>/dev/null; } # timeout leads a process group
trap 'end_part; save; exit 1' INT TERM HUP
save # in the place of what an earlier run has left

# part NAME SECONDS COMMAND...: run it for so many seconds at most (slack times as many in a dry run, as its machine may
# be busy), its output in FOLDER/NAME.log, a line in the table.
part() {
  local name=$1 limit=$(($2 * slack)) least=$(($2 / 3)) begin=$SECONDS left=$((seconds - SECONDS))
  local verdict=PASS status last line tick
  shift 2
  if [ "$left" -le "$least" ]; then
    line=$(printf '%-10s LEFT OUT        it needs %d s, %d are left' "$name" "$least" "$((left > 0 ? left : 0))")
  else
    timeout --kill-after=3 $((limit < left ? limit : left)) "$@" >"$work/$name.log" 2>&1 </dev/null &
    child=$!
    for ((tick = 1; ; tick++)); do
      [ -n "$(jobs -rp)" ] || break
      sleep 0.2
      ((tick % 10)) || save
    done
    wait "$child"
    status=$?
    end_part
    child=""
    last=$(grep -v '^[[:space:]]*$' "$work/$name.log" | tail -n 1 | cut -c1-300)
    case $status in
      0) ;;
      124 | 137) verdict=STOPPED failed=1 ;;
      *) verdict=FAIL failed=1 ;;
    esac
    line=$(printf '%-10s %-8s %4d s  %s' "$name" "$verdict" $((SECONDS - begin)) "$last")
  fi
  echo "$line" >>"$work/table.txt"
  save
  echo "$line"
  [ "$verdict" = PASS ] || tail -n 20 "$work/$name.log"
}

# bench_kernels NAME SECONDS OPTION...: a part of the kernel benchmark, which begins no shape in its last third.
bench_kernels() {
  part "$1" "$2" "$python" run/bench_kernels.py "${@:3}" "${kernels[@]}" --budget $(($2 * 2 / 3)) \
    --json "$work/$1.jsonl"
}

# bench_model NAME SECONDS PRESET OPTION...: a part of the model's benchmark.
bench_model() {
  part "$1" "$2" "$python" run/bench_model.py --preset "${@:3}" "${model[@]}" --json "$work/$1.jsonl"
}

# What the machine has
if [ "$device" = cuda ] && compgen -G "gpu_bundle/wheels/*.whl" >/dev/null; then
  part wheels 40 "$python" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile \
    --no-cache-dir --upgrade --target "$work/site" gpu_bundle/wheels/*.whl
fi
part machine 30 "$python" -m mug.run.benchmarks.versions
# Whether it trains as people start it: ZeRO-3 by DeepSpeed's launcher, evaluation, asynchronous save; then resumes
launch=("$python" -m deepspeed.launcher.runner --quiet --num_accelerators 1)
part train 60 "${launch[@]}" "${train[@]}" --trainer.max_steps "${steps[0]}"
part resume 45 "$python" "${train[@]}" --trainer.max_steps "${steps[1]}"
# The kernels, an op a process, as a broken kernel takes all that its process does with it
bench_kernels patches 30 --op masked_patch_loss "${losses[@]}"
bench_kernels head 30 --op linear_cross_entropy "${losses[@]}"
bench_kernels packed 30 --op attention --shapes packed "${attention[@]}"
bench_kernels dense 60 --op attention --shapes '^((?!packed).)*$' "${attention[@]}"
# Whole models, with the attention that was the fastest; then what ZeRO and torch.compile do to a step
bench_model base 45 "${presets[0]}"
bench_model large 45 "${presets[1]}"
bench_model huge 45 "${presets[2]}"
part zero1 45 "$python" run/bench_step.py --deepspeed ds_configs/zero1.json "${step[@]}"
part zero3 45 "$python" run/bench_step.py --deepspeed ds_configs/zero3.json "${step[@]}"
bench_model compiled 80 "${presets[0]}" --compile
part markdown 20 "$python" -m mug.run.benchmarks.markdown "$work/benchmarks.md" "$work"/*.jsonl
# The tests, with whatever time is left
left=$((seconds - SECONDS))
part tests $((left > 180 ? left : 180)) "$python" -m pytest -v -p no:cacheprovider "${tests[@]}"

echo
cat "$results/table.txt"
exit $failed
