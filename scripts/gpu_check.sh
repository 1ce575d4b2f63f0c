#!/usr/bin/env bash
# Everything about KeepKV's kernels that only a GPU can tell: one command, under ten minutes.
#
#   scripts/gpu_check.sh [OUT]        OUT (default gpu_check): report.md, report.json and the logs of each step
#
# 1. Every Triton kernel compiled and run, in float32, bfloat16 and float16, against float64.
# 2. SGLang's Triton kernels with our score_mod, and CUDA graphs: capture once, change votes and slots, replay.
# 3. FlashInfer's decode and prefill with our variants, custom masks included.
# 4. compute-sanitizer (memcheck) on a small case of each Triton kernel.
# 5. Benchmark: votes on against off, budgets 0.1, 0.2 and 1, contexts of 2k to 64k, batch 1 to 64, GB/s beside a
#    measured copy.
# Needs torch, triton and pytest; what needs SGLang, FlashInfer or compute-sanitizer is skipped, and the report says so, where
# they are not installed. Exit status 0 only when nothing failed; a skip is not a failure. PYTHON chooses the Python.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-gpu_check}")
mkdir -p "$out"
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || command -v python3)}
if ! "$python" -c 'import pytest, torch, triton, sys; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_check: $python sees no CUDA device, or lacks torch, triton or pytest. Nothing was checked." >&2
    exit 2
fi
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
export KEEPKV_CACHE=${KEEPKV_CACHE:-$PWD/.cache} TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$out/triton_cache}
unset TRITON_INTERPRET KEEPKV_GPU_KERNEL
status=0

step() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 rc
    shift 2
    echo "== $name"
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    rc=$?
    tail -n 4 "$out/$name.log"
    if [[ $rc == 5 && $* == *pytest* ]]; then rc=skipped; fi # pytest: every test of the step was skipped
    echo "$name $rc" >>"$out/steps.txt"
    [[ $rc == 0 || $rc == skipped ]] || { status=1; echo "gpu_check: $name ended with $rc; see $out/$name.log" >&2; }
}

rm -f "$out"/*.xml "$out"/*.log "$out"/bench.json "$out"/report.* # of an earlier run
: >"$out/steps.txt"
# -o addopts: without the project's default selection, which leaves the GPU tests out.
tests=("$python" -m pytest -o addopts= -q -rs --import-mode=importlib -p no:cacheprovider)
step triton 150 "${tests[@]}" --junit-xml "$out/triton.xml" tests/kernels/test_attention_triton.py \
    tests/kernels/test_merge_triton.py tests/kernels/test_score_triton.py tests/kernels/test_score_mod_triton.py \
    tests/kernels/test_backend_triton.py tests/kernels/test_layer_triton.py
step graphs 60 "${tests[@]}" --junit-xml "$out/graphs.xml" tests/kernels/test_cuda_graph.py
step flashinfer 200 "${tests[@]}" --junit-xml "$out/flashinfer.xml" tests/kernels/test_flashinfer_gpu.py
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
if [[ -n $sanitizer ]]; then
    step sanitizer 45 "$sanitizer" --error-exitcode 9 "$python" benchmarks/gpu_bench.py --small
else
    echo "== sanitizer: skipped, no compute-sanitizer" && echo "sanitizer skipped" >>"$out/steps.txt"
fi
step bench 140 "$python" benchmarks/gpu_bench.py --out "$out"
"$python" benchmarks/gpu_bench.py --report "$out"
exit $status
