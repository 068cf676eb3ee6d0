#!/bin/sh
# On a machine that fetches nothing, with the packages of the folder wheels (make wheels, make wheels-flash-4) beside
# its own torch, transformers and accelerate:
#   sh scripts/on_a_gpu.sh [WORDS]   python -m benchmarks gpu WORDS
#   sh scripts/on_a_gpu.sh test      tests/test_gpu.py
# PYTHON names another Python than python3.
set -e
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
for wheel in wheels/*.whl; do
  "$python" -m zipfile --extract "$wheel" "$site"
done
dsl="$site/nvidia_cutlass_dsl/dsl_packages" # of FlashAttention 4, which an installation puts on the path
export PYTHONPATH="$PWD/src:$PWD:$site:$dsl" HF_HUB_OFFLINE=1
if [ "$1" = test ]; then
  "$python" -m pytest tests/test_gpu.py
else
  "$python" -m benchmarks gpu "$@"
fi
