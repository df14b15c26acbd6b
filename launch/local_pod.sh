#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# N processes on this machine as one run, as a pod would do it: to try a configuration, and for tests.
#
#   launch/local_pod.sh [--dry-run] [--port PORT] [--devices D] N FLAGS_OF_MAIN...
#   launch/local_pod.sh 2 --config=configs/quickstart.py --workdir=/tmp/run --config.mesh.fsdp=2
#
# --devices: CPU devices of each process (default 1). Each line of output starts with the process's number.
# The exit status is 2 or 3 if a process ended with it (it would again), else that of a process that crashed,
# else 75 if one ended with it (run it again to go on), else the first other than 0. SIGTERM is handed on to
# all processes.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

port=""
devices=1
while [[ "${1:-}" == --* ]]; do
  case "$1" in
    --dry-run) dry_run=1; shift ;;
    --port) port="$2"; shift 2 ;;
    --devices) devices="$2"; shift 2 ;;
    *) usage "$0" ;;
  esac
done
[[ "${1:-}" =~ ^[1-9][0-9]*$ && $# -ge 2 ]] || usage "$0"
count="$1"
shift
if [[ -z "$port" ]]; then
  port="$("${PYTHON:-python3}" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')"
fi

export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="$devices"
DIGSEG_JAX_TOKEN="$(new_token)"
export DIGSEG_JAX_TOKEN
pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
for ((i = 0; i < count; i++)); do
  command=("${PYTHON:-python3}" -u -m digseg_jax.main "$@"
    "--coordinator=127.0.0.1:$port" "--num_processes=$count" "--process_id=$i")
  if [[ -n "$dry_run" ]]; then
    show "JAX_PLATFORMS=cpu" "JAX_NUM_CPU_DEVICES=$devices" "${command[@]}"
  else
    "${command[@]}" > >(sed -u "s/^/[$i] /") 2>&1 &
    pids+=($!)
  fi
done

statuses=()
for pid in "${pids[@]}"; do
  while true; do
    code=0
    wait "$pid" || code=$?
    kill -0 "$pid" 2>/dev/null || break # a trapped signal ends `wait` early
  done
  statuses+=("$code")
done
exit "$(verdict "${statuses[@]}")"
