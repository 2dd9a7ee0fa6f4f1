#!/usr/bin/env bash
# Replace the servers behind nginx.conf one after the other, so that no request is dropped:
#   update.sh 8001 8002
# RESTART is what restarts the server of the port that is put behind it, and returns when the old one has ended.
set -euo pipefail

restart=${RESTART:-systemctl restart doge-deploy@}
seconds=${WAIT_SECONDS:-120}

if (($# < 2)); then
  echo "usage: update.sh PORT PORT..., the ports of at least two servers, so that one is always there" >&2
  exit 2
fi

wait_until_ready() {
  local deadline=$((SECONDS + seconds))
  until curl --silent --fail --output /dev/null --max-time 2 "http://127.0.0.1:$1/ready"; do
    if ((SECONDS >= deadline)); then
      echo "the server on port $1 is not ready after $seconds s; those behind it were not touched" >&2
      exit 1
    fi
    sleep 0.2
  done
}

for port in "$@"; do wait_until_ready "$port"; done
for port in "$@"; do
  # shellcheck disable=SC2086  # it is a command and its options
  $restart"$port"
  wait_until_ready "$port"
  echo "port $port: replaced"
done
