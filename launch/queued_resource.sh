#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Asks for a (spot) TPU slice, runs on it, and after each preemption asks again until the run has ended.
#
#   NAME=run1 ZONE=us-east5-b TYPE=v6e-32 RUNTIME=v2-alpha-tpuv6e \
#     launch/queued_resource.sh [--dry-run] FLAGS_OF_MAIN...
#
# PROJECT is optional; SPOT=0 asks for capacity that is not taken away; POLL is the time between looks
# in seconds (default 60); ATTEMPTS how often a slice is asked for (default 1000); MISSES how many looks in
# a row may fail (default 10). Keep it running where it can stay, such as in tmux on a small VM: it ends when
# main ends with 0, when main (or gcloud) refuses with 2 or main lacks memory (3), which would be the same on the
# next slice, or with 1 when gcloud no longer reports the state.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

if [[ "${1:-}" == --dry-run ]]; then
  dry_run=1
  shift
fi
[[ $# -ge 1 ]] || usage "$0"
need NAME ZONE TYPE RUNTIME
plain NAME ZONE TYPE RUNTIME PROJECT
place=("--zone=$ZONE")
[[ -z "${PROJECT:-}" ]] || place+=("--project=$PROJECT")
spot=(--spot)
[[ "${SPOT:-1}" != 0 ]] || spot=()

state() {
  gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" --format='value(state.state)'
}

remove() {
  run gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --quiet --force
}

for ((attempt = 1; attempt <= ${ATTEMPTS:-1000}; attempt++)); do
  status=0
  run gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" "${place[@]}" \
    --accelerator-type="$TYPE" --runtime-version="$RUNTIME" "${spot[@]}" || status=$?
  if ((status)); then
    # At first a wrong setting; later a moment without an answer, or a slice that could not be removed.
    ((attempt > 1 && status != 2)) || exit "$status"
    remove || true
    sleep "${POLL:-60}"
    continue
  fi
  if [[ -n "$dry_run" ]]; then
    echo "# until it is ACTIVE: gcloud compute tpus queued-resources describe $NAME ${place[*]}"
    TPU="$NAME" launch/tpu_vm.sh --dry-run "$@"
    remove
    exit 0
  fi
  misses=0
  while true; do
    if now="$(state)"; then
      misses=0
      [[ ! "$now" =~ ^(ACTIVE|FAILED|SUSPENDED)$ ]] || break
      echo "attempt $attempt: $NAME is ${now:-not there yet}"
    elif ((++misses >= ${MISSES:-10})); then
      remove || echo "error: $NAME could not be removed; look whether it is still there" >&2
      echo "error: gcloud did not report the state of $NAME $misses times in a row, see above" >&2
      exit 1
    fi
    sleep "${POLL:-60}"
  done
  status=1
  if [[ "$now" == ACTIVE ]]; then
    status=0
    TPU="$NAME" launch/tpu_vm.sh "$@" || status=$?
  fi
  remove || true
  case "$status" in
    0) exit 0 ;;
    2 | 3) exit "$status" ;;
  esac
  echo "attempt $attempt ended with $status; asking for a slice again" >&2
  sleep 10
done
exit 1
