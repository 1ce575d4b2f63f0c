#!/usr/bin/env bash
# Launch commands for a machine with NVIDIA GPUs.
#
#   examples/gpu_server.sh plain MODEL [PORT] [SGLANG FLAGS]     stock SGLang, the plugin installed and out of the way
#   examples/gpu_server.sh keepkv MODEL [PORT] [SGLANG FLAGS]    KeepKV: see below
#
# More than one GPU:
#   examples/gpu_server.sh keepkv MODEL 30000 --tp-size 4        one server on four GPUs, kv heads shared out
#   GPUS_EACH=2 examples/router.sh MODEL --port 30000            two servers of two GPUs each behind a cache-aware router
#   examples/gpu_server.sh keepkv MODEL 30000 --dp-size 2        SGLang's own: no cache-aware choice of the replica
#
# Honest: servers with KeepKV and its Triton kernels have run on one kind of GPU (docs/gpu.md), FlashInfer's variants
# have not, nor several GPUs: --tp-size and --dp-size ran on CPUs (docs/support.md). Run scripts/gpu_check.sh first, and
# compare answers with those of `plain`. --enable-keepkv chooses keepkv_triton; --attention-backend keepkv_flashinfer is
# the other. SGLang's own backends (triton, fa3, flashinfer) do not weight attention by votes and are refused beside
# --enable-keepkv.
set -euo pipefail

if [[ $# -lt 2 ]]; then
    sed -n '2,10p' "$0" >&2
    exit 2
fi
mode=$1 model=$2 port=${3:-30000}
shift $(($# < 3 ? $# : 3))

case $mode in
plain)
    # The baseline to compare with. Without --enable-keepkv nothing of SGLang's behaviour changes: add
    # --tp-size, --mem-fraction-static, --attention-backend and the rest as you would without the plugin.
    exec python -m sglang.launch_server --model-path "$model" --host 127.0.0.1 --port "$port" \
        --enable-cache-report "$@"
    ;;
keepkv)
    # To run it on the CPU of this machine instead, hide the GPU: CUDA_VISIBLE_DEVICES="" examples/gpu_server.sh ...
    # --attention-backend is chosen (add keepkv_flashinfer below to try that). Leave out: --radix-cache-backend, --page-size above 1,
    # --speculative-algorithm, --enable-hierarchical-cache. `keepkv check` says what this installation can do.
    flags=(
        --enable-cache-report
        --enable-keepkv
        --keepkv-budget 0.2          # slots kept of each turn's tokens; a request may ask for another
        --keepkv-merge attention_matching # or least_squares, tangent, zip, mean, evict
        --keepkv-interval 64         # generated tokens between two compressions of a reply
    )
    exec python -m sglang.launch_server --model-path "$model" \
        --host 127.0.0.1 --port "$port" "${flags[@]}" "$@"
    ;;
*)
    echo "unknown mode $mode: use plain or keepkv" >&2
    exit 2
    ;;
esac
