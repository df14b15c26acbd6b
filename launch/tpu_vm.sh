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
# After a preemption (every host exits with 75) or a crash, the same command resumes the run. The exit status
# is 2 or 3 if a host ended with it (it would again), else that of a host that crashed, else 75 if one ended
# with it, else the first other than 0; 69 if another command is running on a host.
# Ctrl-C or a lost connection ends the ssh sessions but not the run, which the same command then follows
# again (its log is ~/digseg_run/log on each host). To end the run:
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
run gcloud compute tpus tpu-vm scp "$archive" "$TPU:digseg_jax.tar.gz" "${place[@]}" --worker=all

flags="$(start_timeout 300 "$@")$(printf '%q ' "$@")"
token="$(new_token)" id="$(new_token)"
[[ -z "$dry_run" ]] || token=TOKEN id=ID
# stands for the tree and the flags: with the same ones a run that is still going on is followed
command="$({ cat "$scratch/files"; xargs -0 cat -- < "$scratch/files"; printf '%s\0' "$@"; } | cksum | tr ' ' -)"
remote="export DIGSEG_JAX_TOKEN=$token PYTHON=$(printf '%q' "${PYTHON:-}")
host=\$(tar -xzOf ~/digseg_jax.tar.gz launch/tpu_host.sh) || exit 1
exec bash -c \"\$host\" tpu_host.sh $id $command $flags"
# Without the option a connection that has died, as at a preemption, would be waited for for ever.
ssh=(gcloud compute tpus tpu-vm ssh "$TPU" "${place[@]}" --worker=all
  --ssh-flag=-oServerAliveInterval=30 "--command=$remote")
if [[ -n "$dry_run" ]]; then
  show "${ssh[@]}"
  exit 0
fi
# gcloud returns the status of its first worker that failed, which need not be the one that decides.
status=0
"${ssh[@]}" | sed -u -n -e p -e "s/.*# $id: .* ended with \([0-9]*\)\$/\1/w $scratch/statuses" || status=$?
# shellcheck disable=SC2046 # one word for each host
exit "$(verdict "$status" $(cat "$scratch/statuses"))"
