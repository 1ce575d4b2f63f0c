#!/usr/bin/env bash
# Launch commands for a machine with an NVIDIA GPU.
#
#   examples/gpu_server.sh plain MODEL [PORT]     stock SGLang on the GPU, the plugin installed and out of the way
#   examples/gpu_server.sh keepkv MODEL [PORT]    KeepKV, on the CPU of this machine: see below
#
# Honest: KeepKV's GPU attention backends do not exist yet. With CUDA visible --enable-keepkv ends the start with
# one line that says so. No attention backend of SGLang's own can stand in, since none weights attention by votes:
# --attention-backend triton, fa3 or flashinfer beside --enable-keepkv is refused too. So today KeepKV on such a
# machine means hiding the GPU, as `keepkv` does below.
set -euo pipefail

if [[ $# -lt 2 || $# -gt 3 ]]; then
    sed -n '2,5p' "$0" >&2
    exit 2
fi
mode=$1 model=$2 port=${3:-30000}

case $mode in
plain)
    # The baseline to compare with. Without --enable-keepkv nothing of SGLang's behaviour changes: add
    # --tp-size, --mem-fraction-static, --attention-backend and the rest as you would without the plugin.
    exec python -m sglang.launch_server --model-path "$model" --host 127.0.0.1 --port "$port" \
        --enable-cache-report
    ;;
keepkv)
    # An empty CUDA_VISIBLE_DEVICES makes keepkv-sglang's CPU platform step in. Small models only.
    # Leave out: --attention-backend, --radix-cache-backend (chosen by --enable-keepkv), --page-size above 1,
    # --speculative-algorithm, --enable-hierarchical-cache. `keepkv check` says what this installation can do.
    flags=(
        --enable-cache-report
        --enable-keepkv
        --keepkv-budget 0.2          # slots kept of each turn's tokens; a request may ask for another
        --keepkv-merge attention_matching # or least_squares, tangent, zip, mean, evict
        --keepkv-interval 64         # generated tokens between two compressions of a reply
    )
    CUDA_VISIBLE_DEVICES="" exec python -m sglang.launch_server --model-path "$model" \
        --host 127.0.0.1 --port "$port" "${flags[@]}"
    ;;
*)
    echo "unknown mode $mode: use plain or keepkv" >&2
    exit 2
    ;;
esac
