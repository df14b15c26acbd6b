#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A run on an existing TPU VM slice: copies this tree to every host, installs, starts main on all of them.
#
#   TPU=my-slice ZONE=us-central2-b launch/tpu_vm.sh [--dry-run] FLAGS_OF_MAIN...
#   TPU=my-slice ZONE=us-central2-b launch/tpu_vm.sh --config=configs/ade20k.py --workdir=gs://bucket/run
#
# PROJECT is optional; PYTHON names the Python of the hosts (default: one of 3.11 or newer is found there, or
# installed, see prepare_host.sh). Hosts get the files that git tracks, as they are here; --dry-run tells
# how many, and what is left out.
# Nothing but the same command is needed on each host: a slice knows its processes.
# After a preemption (every host exits with 75) or a crash, the same command resumes the run.
# Ctrl-C ends the ssh sessions but not the run; to end that:
#   gcloud compute tpus tpu-vm ssh my-slice --zone=... --worker=all --command='pkill -TERM -f digseg_jax.main'
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

if [[ "${1:-}" == --dry-run ]]; then
  dry_run=1
  shift
fi
[[ $# -ge 1 ]] || usage "$0"
need TPU ZONE
plain TPU ZONE PROJECT
place=("--zone=$ZONE")
[[ -z "${PROJECT:-}" ]] || place+=("--project=$PROJECT")

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
archive="$scratch/digseg_jax.tar.gz"
list_tree "$scratch/files"
need_config "$scratch/files" "$@"
describe_tree "$scratch/files"
run tar -czf "$archive" --null -T "$scratch/files"
run gcloud compute tpus tpu-vm scp "$archive" "$TPU:/tmp/digseg_jax.tar.gz" "${place[@]}" --worker=all

flags="$(start_timeout 300 "$@")$(printf '%q ' "$@")"
token="$(new_token)"
[[ -z "$dry_run" ]] || token=TOKEN
remote="set -e
mkdir -p ~/digseg_jax && tar -xzf /tmp/digseg_jax.tar.gz -C ~/digseg_jax && cd ~/digseg_jax
PYTHON=$(printf '%q' "${PYTHON:-}") launch/prepare_host.sh ~/venv
. ~/venv/bin/activate
export DIGSEG_JAX_TOKEN=$token
python -u -m digseg_jax.main $flags"
run gcloud compute tpus tpu-vm ssh "$TPU" "${place[@]}" --worker=all --command="$remote"
