# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# What the launchers share; to be sourced.

# exit status of digseg_jax.main after a preemption: saved, start again (digseg_jax/errors.py)
export PREEMPTED=75
# exit status of tpu_vm.sh where another command runs on the hosts
export BUSY=69
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

# Prints the one of these exit statuses that says what has to be done: another run that is in the way is for
# a person to end; what main refuses (2, 3) would come again; a crash hides behind what it does to the other
# processes, which save (75) or are aborted or killed.
verdict() {
  local status rank worst=0 highest=0
  for status in "$@"; do
    case "$status" in
      0) rank=0 ;;
      134 | 137 | 143) rank=1 ;;
      "$PREEMPTED") rank=2 ;;
      2 | 3) rank=4 ;;
      "$BUSY") rank=5 ;;
      *) rank=3 ;;
    esac
    if ((rank > highest)); then
      highest="$rank"
      worst="$status"
    fi
  done
  echo "$worst"
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

# Ends with a message if a named variable holds what another program would read as something else: an
# option, a second line, YAML. Empty ones pass.
plain() {
  local variable legal='^[A-Za-z0-9._:/@,+=][A-Za-z0-9._:/@,+=-]*$'
  for variable in "$@"; do
    if [[ -n "${!variable:-}" && ! "${!variable}" =~ $legal ]]; then
      printf 'error: %s=%q: legal are letters, digits and . _ : / @ , + = -, the last not in front\n' \
        "$variable" "${!variable}" >&2
      exit 2
    fi
  done
}

# Ends with a message if a flag of main holds a line break, which job files cannot carry.
one_line() {
  local flag
  for flag in "$@"; do
    if [[ "$flag" == *$'\n'* ]]; then
      printf 'error: %q: a flag must be one line\n' "$flag" >&2
      exit 2
    fi
  done
}

# Prints --start_timeout=$1 and a space, unless the flags after it have that flag, which main takes once,
# or name a mode of one process, which does not take it.
start_timeout() {
  local seconds="$1" flag before=""
  shift
  for flag in "$@"; do
    [[ ! "$flag" =~ ^--?start_timeout(=|$) ]] || return 0
    [[ ! "$before$flag" =~ ^--?mode=(predict|demo|compile)$ ]] || return 0
    before=""
    [[ ! "$flag" =~ ^--?mode$ ]] || before="$flag="
  done
  printf -- '--start_timeout=%s ' "$seconds"
}

# A secret that the processes of a run share, so that no other program takes part in their roll call.
new_token() {
  od -An -N16 -tx1 /dev/urandom | tr -d ' \n'
}

# Writes the names of this tree's files to the file $1, each ended by a zero byte: what git tracks, as it
# is here now. Without git (a tree that was copied), the folders and files that a run needs.
list_tree() {
  local file
  if [[ "$(git rev-parse --show-toplevel 2>/dev/null)" == "$(pwd -P)" ]]; then
    git ls-files -z | while IFS= read -r -d '' file; do
      [[ ! -f "$file" ]] || printf '%s\0' "$file" # a tracked file may have been removed
    done > "$1"
  else
    find digseg_jax configs launch requirements*.txt pyproject.toml README.md LICENSE \
      -name __pycache__ -prune -o -type f -print0 > "$1"
  fi
}

# Ends with a message if the flags after the list of files $1 name a configuration that is not in it.
need_config() {
  local files="$1" flag file
  shift
  for flag in "$@"; do
    file="${flag#--config=}"
    file="${file%%:*}" # a version
    if [[ "$flag" == --config=* && -f "$file" ]] && ! grep -qzFx -- "${file#./}" "$files"; then
      echo "error: --config=$file would not be copied, git does not track it: git add $file" >&2
      exit 2
    fi
  done
}

# Says what is in the list of files $1, and what git knows nothing of and is therefore not in it.
describe_tree() {
  local count bytes untracked
  count="$(tr -dc '\0' < "$1" | wc -c)"
  bytes="$(xargs -0 cat -- < "$1" | wc -c)"
  echo "# copied: $((count)) files, $((bytes / 1000)) kB, such as:"
  tr '\0' '\n' < "$1" | awk 'NR <= 10 { print "#   " $0 }'
  untracked="$(git ls-files --others --exclude-standard 2>/dev/null || true)"
  if [[ -n "$untracked" ]]; then
    echo "# not copied: $(($(wc -l <<< "$untracked"))) files that git does not track (git add FILE takes one along):"
    awk 'NR <= 10 { print "#   " $0 }' <<< "$untracked"
  fi
}
