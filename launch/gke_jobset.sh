#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A run on TPU slices of a GKE cluster, as a JobSet that is started again when a pod goes away.
#
#   NAME=run1 IMAGE=REGISTRY/digseg_jax:TAG ACCELERATOR=tpu-v6e-slice TOPOLOGY=4x8 HOSTS=8 CHIPS=4 \
#     launch/gke_jobset.sh [--dry-run] FLAGS_OF_MAIN...
#
# HOSTS: hosts of one slice; CHIPS: chips of one host; SLICES (default 1); RESTARTS (default 1000);
# SERVICE_ACCOUNT: Kubernetes account that may write to the bucket (default "default"). The image is made by
# docker build -f launch/Dockerfile -t IMAGE . && docker push IMAGE; the cluster needs the JobSet controller.
# A configuration error (status 2) or too little memory (3) ends the job; everything else, preemption (75)
# included, starts it again, and the run goes on from its last checkpoint. The same command starts a run again
# whose JobSet has ended: that is deleted first, with its pods. While it has not, a second start is refused.
# --dry-run prints the manifest and the commands.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

if [[ "${1:-}" == --dry-run ]]; then
  dry_run=1
  shift
fi
[[ $# -ge 1 ]] || usage "$0"
need NAME IMAGE ACCELERATOR TOPOLOGY HOSTS CHIPS
plain NAME IMAGE ACCELERATOR TOPOLOGY HOSTS CHIPS SLICES RESTARTS SERVICE_ACCOUNT
one_line "$@"

flags=""
for flag in $(start_timeout 600 "$@") "$@"; do
  quoted="${flag//\'/\'\'}" # YAML's single quotes
  flags+=$'\n'"                    - '$quoted'"
done

token="$(new_token)"

manifest() {
  cat << EOF
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: ${RESTARTS:-1000}
    rules:
      - action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: ${SLICES:-1}
      template:
        spec:
          parallelism: $HOSTS
          completions: $HOSTS
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes: {containerName: main, operator: In, values: [2, 3]}
          template:
            spec:
              restartPolicy: Never
              serviceAccountName: ${SERVICE_ACCOUNT:-default}
              terminationGracePeriodSeconds: 60
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $ACCELERATOR
                cloud.google.com/gke-tpu-topology: $TOPOLOGY
              containers:
                - name: main
                  image: $IMAGE
                  workingDir: /app
                  command: [python, -u, -m, digseg_jax.main]
                  args:$flags
                  env:
                    - {name: DIGSEG_JAX_TOKEN, value: "$token"}
                  resources:
                    limits:
                      google.com/tpu: $CHIPS
EOF
}

delete=(kubectl delete jobset "$NAME" --cascade=foreground)

if [[ -n "$dry_run" ]]; then
  manifest
  echo "# if a JobSet $NAME has ended: ${delete[*]}"
  echo "# kubectl apply -f -"
  exit 0
fi
# The specification of a JobSet cannot be changed, and each start has a new token: there must be none.
conditions='{range .status.conditions[?(@.status=="True")]} {.type}{end}'
there="$(kubectl get jobset "$NAME" --ignore-not-found -o jsonpath="{.metadata.name}$conditions")"
case "$there " in
  " ") ;;
  *" Completed "* | *" Failed "*) "${delete[@]}" ;;
  *)
    echo "error: JobSet $NAME is there and has not ended; to end it: ${delete[*]}" >&2
    exit 2
    ;;
esac
manifest | kubectl apply -f -
