# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# What the launchers share; to be sourced.

# exit status of digseg_jax.main after a preemption: saved, start again (digseg_jax/errors.py)
export PREEMPTED=75
export dry_run=""

# Prints the comment at the head of a script, and ends it.
usage() {
  sed -n '3,/^[^#]/{/^#/s/^# \{0,1\}//p}' "launch/$(basename "$1")" >&2
  exit 2
}

# Prints a command so that it can be pasted.
show() {
  printf '%q ' "$@"
  printf '\n'
}

# Runs a command, or prints it in a dry run.
run() {
  if [[ -n "$dry_run" ]]; then show "$@"; else "$@"; fi
}

# Ends with a message unless every named variable has a value.
need() {
  local variable
  for variable in "$@"; do
    if [[ -z "${!variable:-}" ]]; then
      echo "error: set $variable (see the head of this script)" >&2
      exit 2
    fi
  done
}
