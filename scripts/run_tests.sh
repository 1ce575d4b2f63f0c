#!/usr/bin/env bash
# Every test, in two pytests at once: the long server tests (`long` below), and everything else, which starts servers
# too. A server under test leaves a core idle much of the time; the two take about equally long. Arguments go to both.
# Exit status 0 only when both passed; one that selects nothing (a path, -k) is fine as long as the other does.
set -uo pipefail
set -m # job control: without it bash starts background jobs with SIGINT ignored, and their children inherit that
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
logs=$(mktemp -d)
pytest=("$python" -m pytest --durations 15 "$@")
long=(tests/server/test_{pressure,replay,faults,originals,second_model,stock,verify,metrics,pieces}.py)
not_long=() not_others=()
for path in tests/* tests/server/test_*.py; do
    if [[ " ${long[*]} " == *" $path "* ]]; then
        not_others+=(--ignore "$path")
    elif [[ $path != tests/server && $path != tests/conftest.py && $path != tests/__init__.py && $path != tests/support ]]; then
        not_long+=(--ignore "$path")
    fi
done
"${pytest[@]}" "${not_others[@]}" >"$logs/others" 2>&1 </dev/null &
others=$!
trap 'kill -- "-$others" 2>/dev/null; rm -rf "$logs"' EXIT
echo "== ${long[*]} (the others run meanwhile, their output follows)"
"${pytest[@]}" "${not_long[@]}" 2>&1 | tee "$logs/server"
server=${PIPESTATUS[0]}
[[ $server == 2 || $server -ge 128 ]] && exit "$server" # interrupted
wait "$others"
rest=$?
echo "== all others"
cat "$logs/others"
echo "== both"
grep -hE "^(FAILED|ERROR) |^=* ?[0-9]+ (passed|failed|error|skipped).* in " "$logs/server" "$logs/others"
[[ $server == 5 && $rest == 5 ]] && exit 5 # pytest: nothing was selected
[[ ($server == 0 || $server == 5) && ($rest == 0 || $rest == 5) ]]
