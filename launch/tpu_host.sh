#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One host's part of a run on a TPU VM slice: unpacks the tree, installs, runs main, and ends as main does.
#
#   bash -c "$(tar -xzOf ~/digseg_jax.tar.gz launch/tpu_host.sh)" tpu_host.sh ID COMMAND FLAGS_OF_MAIN...
#
# tpu_vm.sh has it run on every host, from the archive, since the tree of a run must not change under it. ID
# is new with each start of tpu_vm.sh; COMMAND stands for the tree and the flags. When an ssh session is cut,
# gcloud runs its command again, while main goes on. Therefore main runs apart from the session, under a
# lock; a session starts it or finds it running, follows its log and returns its status, which is in a file.
# Another command that is running is left alone (status 69). All of this is in ~/digseg_run.
set -euo pipefail

state=~/digseg_run
id="$1"
command="$2"
shift 2

# What runs apart from the session. It holds the lock, descriptor 9, for as long as main or this shell lives.
# shellcheck disable=SC2317 # called through its text
work() {
  local status=0
  # whole folders are removed: files that have left the tree would stay, and count in the code's checksum
  mkdir -p ~/digseg_jax && cd ~/digseg_jax && rm -rf configs digseg_jax launch tests \
    && tar -xzf ~/digseg_jax.tar.gz || status=1
  ((status)) || launch/prepare_host.sh ~/venv || status=$?
  if ((!status)); then
    # shellcheck source=/dev/null
    . ~/venv/bin/activate
    trap : TERM INT HUP # pkill -f finds this shell, too: it stays until main has saved
    python -u -m digseg_jax.main "$@" || status=$?
  fi
  echo "$status" > ~/digseg_run/status
}

# Ends the session: tpu_vm.sh collects these lines, since gcloud tells the status of one host only.
finish() {
  printf '\n# %s: %s ended with %s\n' "$id" "$(hostname)" "$1"
  exit "$1"
}

mkdir -p "$state"
exec 9>> "$state/lock"
lines=20 # of a log that another session has shown
if flock -w 2 9; then
  if [[ "$(head -n 1 "$state/job" 2>/dev/null)" != "$id" ]]; then # otherwise it has ended meanwhile
    rm -f "$state/status"
    printf '%s\n' "$id" "$command" "$*" > "$state/job"
    [[ ! -e "$state/log" ]] || mv -f "$state/log" "$state/log.before"
    : > "$state/log"
    lines=+1
    setsid --fork bash -c "$(declare -f work); work \"\$@\"" work "$@" < /dev/null >> "$state/log" 2>&1
  fi
elif [[ "$(sed -n 2p "$state/job")" != "$command" ]]; then
  printf 'error: %s: another command is running here: %s\n' "$(hostname)" "$(sed -n 3p "$state/job")" >&2
  finish 69
else
  echo "# $(hostname): the same command is running here, its log goes on"
fi
exec 9>&- # the lock is with `work` now

# Follow the log until the lock is free.
trap : TERM
flock -s "$state/lock" true &
tail -n "$lines" -f --pid=$! "$state/log" || true
flock -s "$state/lock" true # `tail` may have ended early
finish "$(cat "$state/status" 2>/dev/null || echo 137)" # no status: killed, or the host was started anew
