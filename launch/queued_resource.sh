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
# next slice, or with 1 when gcloud no longer reports the state. A queued resource of this name that is there
# at the start is taken over, with the run on it: so the same command goes on after Ctrl-C or a restart of
# this machine. If another command runs on it, it is left alone (69). A slice is billed until it is deleted:
# where one may be left, the last lines say how to delete it.
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

delete=(gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --quiet --force)

# Prints fields of the queued resource.
describe() {
  gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" --format="value($1)"
}

remove() {
  run "${delete[@]}" && billed=""
}

# Says at the end what may cost money from now on.
# shellcheck disable=SC2317 # called by a trap
tell() {
  if [[ -n "$billed" ]]; then
    echo "$NAME may still be there, and is billed then. The same command takes it over again; this deletes it:" >&2
    show "${delete[@]}" >&2
  fi
}

billed=""
trap tell EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

found=""
if [[ -z "$dry_run" ]]; then
  # Nothing to be found is the rule; what else is wrong, `create` will say.
  while found="$(describe state.state 2>/dev/null)" && [[ "$found" == DELETING ]]; do
    echo "an earlier $NAME is being deleted"
    sleep "${POLL:-60}"
  done
  if [[ -n "$found" ]]; then
    is="$(describe 'tpu.nodeSpec[0].nodeId,tpu.nodeSpec[0].node.acceleratorType')"
    if [[ "$is" != "$NAME"$'\t'"$TYPE" ]]; then
      echo "error: there is a queued resource $NAME already, its node and type are ${is/$'\t'/, }: set another NAME" >&2
      exit 2
    fi
    billed=1
    echo "$NAME is there already: taken over"
  fi
fi

for ((attempt = 1; attempt <= ${ATTEMPTS:-1000}; attempt++)); do
  if ((attempt > 1)) || [[ -z "$found" ]]; then
    before="$billed" billed=1
    status=0
    run gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" "${place[@]}" \
      --accelerator-type="$TYPE" --runtime-version="$RUNTIME" "${spot[@]}" || status=$?
    if ((status)); then
      billed="$before"
      # At first a wrong setting; later a moment without an answer, or a slice that could not be removed.
      ((attempt > 1 && status != 2)) || exit "$status"
      remove || true
      sleep "${POLL:-60}"
      continue
    fi
  fi
  if [[ -n "$dry_run" ]]; then
    echo "# until it is ACTIVE: gcloud compute tpus queued-resources describe $NAME ${place[*]}"
    TPU="$NAME" launch/tpu_vm.sh --dry-run "$@"
    remove
    exit 0
  fi
  misses=0
  while true; do
    if now="$(describe state.state)"; then
      misses=0
      [[ ! "$now" =~ ^(ACTIVE|FAILED|SUSPENDED)$ ]] || break
      echo "attempt $attempt: $NAME is ${now:-not there yet}"
    elif ((++misses >= ${MISSES:-10})); then
      remove || true
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
  [[ "$status" != "$BUSY" ]] || exit "$status" # somebody's run is on it
  remove || true
  case "$status" in
    0) exit 0 ;;
    2 | 3) exit "$status" ;;
  esac
  echo "attempt $attempt ended with $status; asking for a slice again" >&2
  sleep 10
done
exit 1
