#!/usr/bin/env bash
# Export both bundled checkpoints, look at the bundles, verify them, generate text, build engines, serve one of them. Run
# by `make demo`. Needs doge-deploy on PATH with the extras `export`, `cpu`, `rtx` and `serve`, and curl; no network.
# Leaves nothing behind.
set -euo pipefail

work=$(mktemp -d)
server=
trap '[[ -z $server ]] || kill "$server" 2>/dev/null || true; rm -rf "$work"' EXIT
cd "$work"

# Print a command as one would type it, then run it.
run() {
  show "$@"
  printf '\n'
  "$@"
}

show() {
  printf '\n$'
  local word
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=%-]+$ ]]; then
      printf ' %s' "$word"
    elif [[ $word == *\"* ]]; then
      printf " '%s'" "$word"
    else
      printf ' "%s"' "$word"
    fi
  done
}

for model in doge-tiny doge-tiny-moe; do
  run doge-deploy export "$model" -o "$model" --kv-cache static --kv-cache growing
  run doge-deploy inspect "$model"
  run doge-deploy verify "$model" --greedy-steps 64
  run doge-deploy generate "$model" --greedy --max-new-tokens 60 --prompt "The import statement"
  run doge-deploy export "$model" -o "$model-fp16" --dtype fp16
  run doge-deploy build "$model-fp16" --target trt-rtx
  run doge-deploy inspect "$model-fp16/engines/trt-rtx-fp16-portable"
done

run doge-deploy generate doge-tiny --chat --greedy --prompt "What is a list?"

# any free port: another server may be running on 8000
show doge-deploy serve doge-tiny --port 0
printf ' &\n'
doge-deploy serve doge-tiny --port 0 2> >(tee log >&2) &
server=$!
for ((tenth = 0; tenth < 3000; tenth++)); do
  address=$(sed -n 's/.* serving address=\([^ ]*\).*/\1/p' log 2>/dev/null) || true
  [[ -z $address ]] || break
  kill -0 "$server"
  sleep 0.1
done
run curl --silent --show-error --fail --no-buffer "$address/v1/completions" --header "Content-Type: application/json" --data \
  '{"prompt": "The import statement", "max_tokens": 4, "temperature": 0, "stream": true}'
show kill -TERM %1
printf '\n'
kill -TERM "$server"
wait "$server"
server=

printf '\nBoth checkpoints were exported, verified, run, and built into engines; one was served.\n'
