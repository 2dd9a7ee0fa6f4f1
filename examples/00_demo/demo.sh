#!/usr/bin/env bash
# Export both bundled checkpoints, look at the bundles, verify them, generate text, build engines. Run by `make demo`.
# Needs doge-deploy on PATH with the extras `export`, `cpu` and `rtx`; no network. Leaves nothing behind.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

# Print a command as one would type it, then run it.
run() {
  printf '\n$'
  local word
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./=-]+$ ]]; then printf ' %s' "$word"; else printf ' "%s"' "$word"; fi
  done
  printf '\n'
  "$@"
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
printf '\nBoth checkpoints were exported, verified, run, and built into engines.\n'
