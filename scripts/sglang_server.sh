#!/usr/bin/env bash
# A real SGLang server with KeepKV on a GPU machine without a network and without SGLang; from the repository's root:
#
#   python scripts/sglang_server.py            # where SGLang is installed; carry build/gpu_server along
#   scripts/sglang_server.sh [MODEL] [OUT]     # there. MODEL: a folder; default: the demo model, random weights
#
# Six servers at the same time on one GPU (benchmarks/gpu/serve.py says what each is asked): stock and KeepKV with
# originals in float32; in bfloat16 KeepKV with all defaults, with int4 originals, with a small pool, with chunked
# prefill. OUT (default gpu_check): NAME.json and NAME.log of each. Under six minutes; exit status 0 when every server
# answered. Seen on an H200, the last two of the six behind the others (docs/gpu.md).
set -uo pipefail
cd "$(dirname "$0")/.."
carried=$PWD/build/gpu_server site=${TMPDIR:-/tmp}/keepkv_site
out=$(realpath -m "${2:-gpu_check}")
mkdir -p "$out"
if [[ ! -e $site/complete ]]; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" \
        "$carried"/wheels/*.whl && tar xJf "$carried/sglang.tar.xz" -C "$site" && touch "$site/complete" || exit 2
fi
export PYTHONPATH=$carried/shim:$PWD:$site PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export SGLANG_FORCE_FUSED_OP_BACKEND=torch # SGLang's own CUDA kernels were not carried along
export TRITON_F32_DEFAULT=ieee             # or float32 attention would multiply in TF32
common=(--sampling-backend pytorch --grammar-backend none --max-total-tokens 20000 --mem-fraction-static 0.5
    --cuda-graph-max-bs-decode 8)
if [[ -n ${1:-} ]]; then
    common+=(--model-path "$1")
else
    common+=(--model-path "$carried/model" --load-format dummy)
fi
keepkv=(--enable-keepkv --keepkv-budget 0.2)

serve() { timeout -k 10 330 python3 -m benchmarks.gpu.serve --out "$out" "$@" & }
serve stock "${common[@]}" --dtype float32 --attention-backend triton --disable-prefill-cuda-graph
serve originals "${common[@]}" --dtype float32 "${keepkv[@]}" --keepkv-host-ratio 2 --disable-prefill-cuda-graph
serve int4 "${common[@]}" --dtype bfloat16 "${keepkv[@]}" --keepkv-host-ratio 2 --keepkv-host-dtype int4 \
    --disable-prefill-cuda-graph
serve pressure "${common[@]}" --max-total-tokens 3000 --dtype bfloat16 "${keepkv[@]}" --keepkv-host-ratio 4 \
    --keepkv-host-dtype int4 --disable-prefill-cuda-graph
serve graphs "${common[@]}" --dtype bfloat16 "${keepkv[@]}" --keepkv-host-ratio 2
serve chunked "${common[@]}" --dtype bfloat16 "${keepkv[@]}" --chunked-prefill-size 256 --disable-prefill-cuda-graph
status=0
for job in $(jobs -p); do
    wait "$job" || status=1
done
exit $status
