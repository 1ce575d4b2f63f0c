#!/usr/bin/env bash
# Two or more KeepKV servers behind a cache-aware router: the turns of a conversation go to the server that has it.
#
#   pip install smg                                          SGLang's router; sglang-router is its older name
#   examples/router.sh MODEL [ROUTER FLAGS]                  e.g. --port 30000
#
#   PORTS="31001 31002"        one server for each
#   GPUS_EACH=0                tensor parallelism of each server: 2 takes GPUs 0-1, 2-3, ...; 0 on a CPU
#   SERVER_FLAGS="--keepkv-budget 0.2"
#
# All servers need the same --keepkv flags: what was compressed under others is not found. The router guesses what a server
# has cached from the texts that it sent there. It knows a model by the name in /v1/models, not by "default".
# sglang-router 0.3.2 works too, but drops custom_params and return_meta_info of chats: then the servers' flags decide.
set -euo pipefail

if [[ $# -lt 1 ]]; then
    sed -n '4,9p' "$0" >&2
    exit 2
fi
model=$1
shift
read -ra ports <<<"${PORTS:-31001 31002}"
read -ra flags <<<"${SERVER_FLAGS:---keepkv-budget 0.2}"
gpus=${GPUS_EACH:-0}

trap 'kill $(jobs -p) 2>/dev/null' EXIT # a server that dies, Ctrl-C or SIGTERM: all of them end
trap 'exit 130' INT TERM
workers=()
for n in "${!ports[@]}"; do
    each=()
    ((gpus)) && each=(--tp-size "$gpus" --base-gpu-id "$((n * gpus))")
    python -m sglang.launch_server --model-path "$model" --host 127.0.0.1 --port "${ports[n]}" \
        --enable-keepkv --enable-cache-report "${each[@]}" "${flags[@]}" &
    workers+=("http://127.0.0.1:${ports[n]}")
done
# It waits for the servers. Its own numbers are at --prometheus-port, 29000.
smg launch --policy cache_aware --worker-urls "${workers[@]}" --host 127.0.0.1 --prometheus-host 127.0.0.1 "$@" &
wait -n
