#!/usr/bin/env bash
# What only a GPU can tell about KeepKV's kernels: one command, under ten minutes. No server is started, and no tensor
# parallelism is tried.
#
#   scripts/gpu_check.sh [all|A|B|C] [OUT]    OUT (default gpu_check): report.md, report.json, bench.json, turns.json,
#                                             logs.tar.gz
#
# all: 1 to 5 below. A: correctness, 240 s: 1 and 2. B: speed, 330 s: 5. C: 3 and 4, 300 s.
# At the same time, each in a process of its own, so that one illegal access spoils one file only:
# 1. Every Triton kernel of ours compiled and run against float64, in float32, bfloat16 and float16 (merging and the
#    nearest kept key, which take float32 only, in that); SGLang's Triton kernels with our score_mod, in bfloat16 and
#    float16.
# 2. CUDA graphs: capture once, change votes, slots and queries, replay.
# 3. FlashInfer's modules built, then its decode (CUDA and tensor cores) and prefill with our variants and custom masks.
# 4. compute-sanitizer (memcheck) on a small case of each Triton kernel.
# Then, alone on the GPU:
# 5. Benchmark: votes on against off, budgets 0.1, 0.2 and 1, contexts of 2k to 64k, batch 1 to 64, GB/s beside a
#    measured copy; heads that share cells, in attention and in a compression; compression of turns, replies and under
#    pressure with torch and with our Triton kernels: time, synchronisations, memory; attention of a prefill; originals
#    to and from the host's memory.
# A machine without SGLang: scripts/sglang_kernels.py carries its kernel files along (in build/, found there);
# scripts/sglang_server.sh starts servers on one.
# Needs torch, triton, pytest and tabulate; what needs SGLang, FlashInfer, nvcc or compute-sanitizer is skipped where they
# are not installed, and the report says so. Exit status 0 only when nothing failed; a skip is not a failure, a step that
# runs out of time or leaves no status is one. 2: no GPU, nothing was checked. PYTHON chooses the Python. Compiled
# kernels stay in KEEPKV_CACHE (default .cache) and in FlashInfer's own cache: a second run is faster.
# A, B and the sanitizer have run on an H200 (docs/gpu.md); FlashInfer, a machine with SGLang and a server have not.
set -uo pipefail
cd "$(dirname "$0")/.."
# Seconds since the start at which the first part and the benchmark are over, whatever they have done; the report
# follows. timeout's -k may add GRACE to each.
readonly A="triton_attention triton_merge triton_score triton_layer triton_codec triton_packed_span sglang_score_mod \
sglang_packed graphs"
readonly B="codec packed bench turns"
readonly C="flashinfer_build flashinfer small sanitizer"
mode=all
case ${1:-} in all | A | B | C) mode=$1 && shift ;; esac
case $mode in
    A) EXPECTED=$A CHECKS_END=230 BENCH_END=0 ;;
    B) EXPECTED=$B CHECKS_END=0 BENCH_END=320 ;;
    C) EXPECTED=$C CHECKS_END=290 BENCH_END=0 ;;
    all) EXPECTED="$A $B $C sglang_backend" CHECKS_END=330 BENCH_END=560 ;;
esac
readonly mode EXPECTED CHECKS_END BENCH_END GRACE=10
SECONDS=0
out=$(realpath -m "${1:-gpu_check}")
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || command -v python3)}
# Prints the driver's library, which the process has loaded.
probe='
import pytest, sys, tabulate, torch, triton
if not torch.cuda.is_available(): sys.exit("torch sees no CUDA device")
print(next((line.split()[-1] for line in open("/proc/self/maps") if "/libcuda.so" in line), ""))'
if ! driver=$(timeout -k 5 60 "$python" -c "$probe"); then
    echo "gpu_check: $python sees no CUDA device, or lacks torch, triton, pytest or tabulate. Nothing was checked." >&2
    exit 2
fi
logs=$out/logs
mkdir -p "$logs"
rm -f "$out"/{report.md,report.json,bench.json,turns.json,logs.tar.gz} "$logs"/*.{log,xml,txt} # of an earlier run
: >"$logs/steps.txt"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
"$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("sglang") is None)' \
    || PYTHONPATH=$PYTHONPATH:build/sglang_kernels
PATH=$(dirname "$(timeout -k 5 60 "$python" -c 'import sys; print(sys.executable)')"):$PATH # ninja of the pip wheel
export KEEPKV_CACHE=$(realpath -m "${KEEPKV_CACHE:-.cache}")
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$KEEPKV_CACHE/triton_gpu}
export PYTHONUNBUFFERED=1 # the log of a step that is killed ends where it was
unset TRITON_INTERPRET KEEPKV_GPU_KERNEL

note() { printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "${4:-}" >>"$logs/steps.txt"; } # NAME STATUS SECONDS REMARK

step() { # NAME LIMIT END COMMAND...: at most LIMIT seconds and not beyond END; its exit status, 0 when skipped
    local name=$1 limit=$(($2 < $3 - SECONDS ? $2 : $3 - SECONDS)) begun=$SECONDS rc remark= child signal=TERM
    shift 3
    if ((limit < 5)); then
        note "$name" 124 0 "no time left"
        return 124
    fi
    [[ $* == *"-m pytest"* ]] && signal=INT # it then writes its summary and XML
    timeout -s "$signal" -k "$GRACE" "$limit" "$@" >"$logs/$name.log" 2>&1 &
    child=$!
    trap 'kill "$child"' TERM # timeout passes it on to all that it started
    wait "$child"
    rc=$?
    case $rc in
        5) # pytest ran no test: right only where a package may be missing
            remark="no test ran"
            [[ $name == sglang_* || $name == flashinfer ]] && rc=skipped
            ;;
        77) rc=skipped remark=$(tail -n 1 "$logs/$name.log") ;;
        124 | 137) remark="out of time" ;;
    esac
    note "$name" "$rc" $((SECONDS - begun)) "$remark"
    echo "== $name: $rc, $((SECONDS - begun)) s: $(tail -n 1 "$logs/$name.log")"
    [[ $rc == skipped ]] || return "$rc"
}

tests() { # NAME LIMIT FILE: one file of tests. -o addopts: without the project's selection, which leaves GPU tests out
    step "$1" "$2" "$CHECKS_END" "$python" -m pytest -p benchmarks.gpu.pytest_plugin -o addopts= -v -rs \
        --import-mode=importlib -p no:cacheprovider --junit-xml "$logs/$1.xml" "tests/kernels/$3"
}

toolkit() { # prints a CUDA toolkit. FlashInfer takes the folder above nvcc's: not one where nvcc is a wrapper elsewhere
    local home nvcc
    nvcc=$(command -v nvcc) && nvcc=$(readlink -f "$nvcc")
    for home in "${CUDA_HOME:-}" "${CUDA_PATH:-}" "${nvcc%/bin/nvcc}" /usr/local/cuda /usr/local/cuda-*; do
        if [[ -n $home && -x $home/bin/nvcc && -e $home/include/cuda_runtime.h ]]; then
            echo "$home"
            return
        fi
    done
    return 1
}

flashinfer() {
    local rc
    if [[ -z ${CUDA_HOME:-} ]]; then
        note flashinfer_build skipped 0 "no nvcc: $(tail -n 1 "$logs/nvcc.log")"
        note flashinfer skipped 0 "no nvcc"
        return
    fi
    step flashinfer_build 290 $((CHECKS_END - 40)) "$python" -m benchmarks.gpu.modules "$logs/flashinfer_ready.txt"
    rc=$?
    if ((rc >= 124)); then # ended from outside; with a module that failed, the tests of the others still count
        note flashinfer 1 0 "not run: the build was cut"
        return
    fi
    tests flashinfer 120 test_flashinfer_gpu.py
}

small() { # first without the sanitizer: it compiles
    local sanitizer
    step small 120 "$CHECKS_END" "$python" -m benchmarks.gpu.bench --small || {
        note sanitizer 1 0 "not run: small failed"
        return
    }
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
    if [[ -z $sanitizer ]]; then
        note sanitizer skipped 0 "no compute-sanitizer"
        return
    fi
    # torch's allocator hands out parts of large blocks: a read behind a tensor would be inside one. Errors that torch
    # asks the driver for and handles (capabilities, peers) are no findings.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step sanitizer 90 "$CHECKS_END" "$sanitizer" --error-exitcode 9 \
        --report-api-errors no "$python" -m benchmarks.gpu.bench --small
}

finish() { # the report of whatever has run, in at most 8 files; exits
    trap '' TERM INT
    local status=0 code name
    for name in $EXPECTED; do
        grep -q "^$name"$'\t' "$logs/steps.txt" || note "$name" "no status" 0 "never ended"
    done
    while IFS=$'\t' read -r _ code _; do
        [[ $code == 0 || $code == skipped ]] || status=1
    done <"$logs/steps.txt"
    timeout -k 5 20 "$python" -m benchmarks.gpu.report "$out" || { echo "gpu_check: no report" >&2 && status=1; }
    tar -czf "$out/logs.tar.gz" -C "$out" logs && rm -r "$logs"
    exit $((status | ${1:-0}))
}

stop() {
    kill $(jobs -p) 2>/dev/null
    wait
    note gpu_check 143 "$SECONDS" "stopped from outside"
    finish 1
}
trap stop TERM INT

# FlashInfer links with -lcuda; a container may have the driver's libcuda.so.1 only, and a toolkit without stubs.
if [[ -n $driver ]]; then
    mkdir -p "$KEEPKV_CACHE/libcuda" && ln -sfn "$driver" "$KEEPKV_CACHE/libcuda/libcuda.so"
    export LIBRARY_PATH=$KEEPKV_CACHE/libcuda${LIBRARY_PATH:+:$LIBRARY_PATH}
fi
# The same for the build and for the benchmark: with other flags FlashInfer would compile again.
if home=$(toolkit); then
    export CUDA_HOME=$home
elif home=$(timeout -k 5 60 "$python" -c '
from keepkv_sglang.kernels.attention import flashinfer_build
print(flashinfer_build.cuda_home())' 2>"$logs/nvcc.log"); then
    # Links to the wheels, whose nvcc and CUDA headers differ in version, which CCCL refuses.
    export CUDA_HOME=$home FLASHINFER_EXTRA_CUDAFLAGS=-DCCCL_DISABLE_CTK_COMPATIBILITY_CHECK
else
    unset CUDA_HOME
fi
within() { [[ $mode == all || $mode == "$1" ]]; }

if within C; then
    flashinfer &
    small &
fi
if within A; then
    tests triton_attention 240 test_attention_triton.py &
    tests triton_merge 240 test_merge_triton.py &
    tests triton_score 240 test_score_triton.py &
    tests triton_layer 240 test_layer_triton.py &
    tests triton_codec 240 test_codec_triton.py &
    tests triton_packed_span 240 test_packed_span_triton.py &
    tests sglang_score_mod 240 test_score_mod_triton.py &
    tests sglang_packed 240 test_packed_triton.py &
    tests graphs 120 test_cuda_graph.py &
fi
[[ $mode != all ]] || tests sglang_backend 240 test_backend_triton.py &
wait

if within B; then
    # What is not built yet must not compile while time runs.
    without=()
    [[ -e $logs/flashinfer_ready.txt ]] || without=(--without flashinfer)
    step codec 40 "$BENCH_END" "$python" -m benchmarks.gpu.codec &
    wait
    step packed 60 "$BENCH_END" "$python" -m benchmarks.gpu.packed &
    wait
    limit=$(((BENCH_END - SECONDS) / 2))
    step bench "$limit" "$BENCH_END" \
        "$python" -m benchmarks.gpu.bench --out "$out" --seconds $((limit - 15)) ${without[@]+"${without[@]}"} &
    wait
    limit=$((BENCH_END - SECONDS))
    step turns "$limit" "$BENCH_END" "$python" -m benchmarks.gpu.turns --out "$out" --seconds $((limit - 25)) &
    wait
fi
finish
