#!/usr/bin/env bash
# The tests and benchmarks of a CUDA device, in about eight minutes; results are written as they come, to the folder given
# (or $OUT, or tests/benchmarks/results). `--quick` runs both on a CPU in Triton's interpreter.
set -u
cd "$(dirname "$0")/../.."
export PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
quick=""
if [ "${1:-}" = "--quick" ]; then quick=--quick; shift; fi
results=${1:-${OUT:-tests/benchmarks/results}}
mkdir -p "$results"
within() { timeout -s INT -k 8 "$@"; }  # seconds, command; pytest sums up when it is interrupted

if [ -n "$quick" ]; then
    TRITON_INTERPRET=1 $python -m pytest -q -m gpu tests/gpu/test_focus_triton.py tests/gpu/test_local_attention_triton.py \
        tests/gpu/test_windowed_attention_triton.py 2>&1 | tee "$results/gpu_tests.log"
    status=${PIPESTATUS[0]}
    $python tests/benchmarks/gpu_focus.py --quick --output "$results/gpu_quick.json" || status=1
    exit "$status"
fi
workers=""
if $python -c "import xdist" 2> /dev/null; then workers="-n ${WORKERS:-12} --dist load --maxschedchunk 1"; fi
if $python -c "import pytest_timeout" 2> /dev/null; then workers="$workers --timeout 75 --timeout-method thread"; fi
within 150 $python -m pytest -m gpu tests/gpu/test_focus_triton.py $workers -q --durations=5 --tb=short -rf 2>&1 |
    tee "$results/gpu_tests_focus.log"
status=${PIPESTATUS[0]}
within 75 $python -m pytest -m gpu tests/gpu/test_local_attention_triton.py $workers -q --durations=5 --tb=short -rf 2>&1 |
    tee "$results/gpu_tests_local_attention.log"
[ "${PIPESTATUS[0]}" = 0 ] || status=1
within 50 $python -m pytest -m gpu tests/gpu/test_windowed_attention_triton.py $workers -q --durations=5 --tb=short -rf 2>&1 |
    tee "$results/gpu_tests_windowed_attention.log"
[ "${PIPESTATUS[0]}" = 0 ] || status=1
within 110 $python -m pytest -m gpu tests/gpu/test_models.py $workers -q --durations=8 --tb=short -rf 2>&1 |
    tee "$results/gpu_tests_models.log"
[ "${PIPESTATUS[0]}" = 0 ] || status=1
within 165 $python tests/benchmarks/gpu_focus.py --output "$results/gpu_focus.json" 2>&1 | tee "$results/gpu_focus.log"
[ "${PIPESTATUS[0]}" = 0 ] || status=1
exit "$status"
