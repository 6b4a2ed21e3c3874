#!/bin/bash
# Collect what run/gpu_checks.sh needs on a machine without a network: Linux on x86-64, Python 3.12, with PyTorch.
# usage: run/gpu_bundle.sh [FOLDER]        (`make gpu-bundle` gives it the environment of `make demo`)
#
# FOLDER (gpu_bundle) is replaced as a whole and holds at most 64 MiB:
#   wheels/        WHEELS below, in the versions of constraints.txt: what the parts import and machines with PyTorch
#                  and transformers lack. From pip's own index, whichever it is set to.
#   shards/        the embedded drawings and their tokenizer
#   triton_cache/  optional, a copy of the folder that TRITON_CACHE names: kernels compiled by the same Triton and Python
# PYTHON names the environment's Python.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${PYTHON:-.venv/bin/python}") folder=${1:-gpu_bundle}
WHEELS=(hjson pydantic pydantic_core annotated-types typing-inspection typing_extensions jsonargparse docstring_parser
  typeshed_client simplejpeg)

if [ -e "$folder" ] && [ ! -e "$folder/.gpu_bundle" ]; then
  echo "error: $folder holds something else; name another folder" >&2
  exit 2
fi
rm -rf "$folder"
mkdir -p "$folder/wheels" "$folder/shards"
touch "$folder/.gpu_bundle"
pip=("$python" -m pip --disable-pip-version-check -q)

# DeepSpeed is published as source; without operators built ahead its wheel is pure Python, and fits any machine.
DS_BUILD_OPS=0 "${pip[@]}" wheel --no-deps --no-build-isolation -c constraints.txt -w "$folder/wheels" deepspeed
platforms=()
for glibc in 39 35 34 31 28 27 26 24 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
"${pip[@]}" download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
  --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -c constraints.txt -d "$folder/wheels" "${WHEELS[@]}"
"$python" -m mug.data.builders.openmoji | while read -r file; do cp "$file" "$folder/shards/"; done
[ -z "${TRITON_CACHE:-}" ] || cp -r "$TRITON_CACHE" "$folder/triton_cache"

mebibytes=$(($(du -sb "$folder" | cut -f1) / 2 ** 20))
if [ "$mebibytes" -ge 64 ]; then
  echo "error: $folder has $mebibytes MiB and must stay below 64; leave TRITON_CACHE out, or name a smaller one" >&2
  exit 2
fi
du -sh "$folder"/*
echo "bundle: $mebibytes of 64 MiB, in $folder"
