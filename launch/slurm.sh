#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A run on the GPUs of a SLURM cluster, one process for each GPU, queued again after what passes.
#
#   NODES=2 GPUS=8 launch/slurm.sh [--dry-run] FLAGS_OF_MAIN...
#
# NODES (default 1), GPUS of a node (default 8), TIME (default 24:00:00), PARTITION, ACCOUNT: as sbatch
# knows them. CPUS of each GPU's process and MEM of a node (such as 200G; 0: all of it), where the cluster
# gives too few by default: reading and cropping images take about 8 CPUs a GPU. VENV: an environment with
# the requirements and jax[cuda13], activated on each node. The working directory must be one that all
# nodes see. main learns from SLURM which processes take part. 90 s before the time limit or at a preemption
# SLURM sends SIGTERM: main saves and ends with 75, and the job goes back into the queue. So it does when a
# process was killed (137), which the others end with 75 or are aborted for (134), but then at most RESTARTS
# times (default 20). Any other failure of a process ends it, whatever the others end with. --dry-run prints
# the job script and the command.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

if [[ "${1:-}" == --dry-run ]]; then
  dry_run=1
  shift
fi
[[ $# -ge 1 ]] || usage "$0"
plain NODES GPUS TIME PARTITION ACCOUNT RESTARTS CPUS MEM
optional=""
[[ -z "${PARTITION:-}" ]] || optional+="#SBATCH --partition=$PARTITION"$'\n'
[[ -z "${ACCOUNT:-}" ]] || optional+="#SBATCH --account=$ACCOUNT"$'\n'
[[ -z "${CPUS:-}" ]] || optional+="#SBATCH --cpus-per-task=$CPUS"$'\n'
[[ -z "${MEM:-}" ]] || optional+="#SBATCH --mem=$MEM"$'\n'
tasks="" # srun does not take sbatch's number over
[[ -z "${CPUS:-}" ]] || tasks="export SRUN_CPUS_PER_TASK=$CPUS"
activate=""
[[ -z "${VENV:-}" ]] || activate=". $(printf '%q' "$VENV/bin/activate")"
flags="$(start_timeout 300 "$@")$(printf '%q ' "$@")"

script() {
  cat << EOF
#!/usr/bin/env bash
#SBATCH --job-name=digseg_jax
#SBATCH --nodes=${NODES:-1}
#SBATCH --ntasks-per-node=${GPUS:-8}
#SBATCH --gpus-per-node=${GPUS:-8}
#SBATCH --time=${TIME:-24:00:00}
#SBATCH --signal=TERM@90
#SBATCH --requeue
#SBATCH --open-mode=append
${optional}cd $(printf '%q' "$PWD")
$activate
$tasks
export DIGSEG_JAX_TOKEN="\$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')"
# srun ends with the highest status of its tasks: 200 is added to one that would come again, so that it is
# above all that pass. The trap keeps a task's shell until main has saved.
task='
  trap : TERM INT HUP USR1 XCPU
  code=0
  "\$@" || code=\$?
  case "\$code" in [123]) code=20\$code ;; esac
  exit "\$code"
'
status=0
srun --kill-on-bad-exit=0 bash -c "\$task" task python -u -m digseg_jax.main $flags || status=\$?
case "\$status" in 20[123]) status="\${status#20}" ;; esac
case "\$status" in
  $PREEMPTED) again=1 ;;
  134 | 137) again=\$((\${SLURM_RESTART_COUNT:-0} < ${RESTARTS:-20})) ;;
  *) again=0 ;;
esac
if [ "\$again" -eq 1 ]; then scontrol requeue "\$SLURM_JOB_ID"; fi
exit "\$status"
EOF
}

if [[ -n "$dry_run" ]]; then
  script
  echo "# sbatch"
else
  script | sbatch
fi
