# SPDX-License-Identifier: Apache-2.0
"""The job script for SLURM: what it asks for, and when it goes back into the queue."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from launched import FLAGS, SETTINGS, TOKEN, dry, fake, run

ACTIVATE = ". /opt/a\\ venv/bin/activate"


def job(folder: Path, srun: str, python: str = "", **env: str) -> tuple[int, str]:
    """Runs the job script with these stand-ins; returns its status, and what they wrote."""
    text, out = dry("slurm.sh"), folder / "out"
    path = fake(folder / "bin", srun=srun, python=python, scontrol='echo "$@" >> "$OUT"')
    env |= {"PATH": path, "OUT": str(out), "SLURM_JOB_ID": "77"}
    assert ACTIVATE in text
    command = ["bash", "-c", text.replace(ACTIVATE, "")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    return done.returncode, out.read_text() if out.exists() else ""


@pytest.mark.parametrize(
    ("status", "starts", "again"),
    [(75, 0, True), (75, 99, True), (137, 0, True), (134, 19, True), (134, 20, False), (2, 0, False),
     (1, 0, False), (0, 0, False)],
)  # fmt: skip
def test_the_slurm_script_is_shell_and_goes_back_into_the_queue_after_what_passes(
    tmp_path, status, starts, again
):
    text = dry("slurm.sh")
    assert "cpus-per-task" not in text and "--mem" not in text  # the cluster's own, unless they are set
    own = run("slurm.sh", "--dry-run", *FLAGS, **SETTINGS["slurm.sh"], CPUS="6", MEM="200G").stdout
    assert "#SBATCH --cpus-per-task=6\n#SBATCH --mem=200G\n" in own
    assert "\nexport SRUN_CPUS_PER_TASK=6\n" in own
    assert "#SBATCH --ntasks-per-node=4" in text and "--signal=TERM@90" in text
    # the cluster's commands say how they were called
    srun = f'printf "%s|" "${TOKEN}" "$@" >> "$OUT"; exit {status}'
    code, out = job(tmp_path, srun, SLURM_RESTART_COUNT=str(starts))
    assert code == status
    assert out.endswith("requeue 77\n") == again and all(flag + "|" in out for flag in FLAGS)
    assert len(out.partition("|")[0]) == 32


@pytest.mark.parametrize(
    ("statuses", "expected", "again"),
    [((0, 0), 0, False), ((75, 75), 75, True), ((0, 75), 75, True), ((75, 137), 137, True),
     ((134, 75), 134, True), ((2, 75), 2, False), ((75, 3), 3, False), ((75, 1), 1, False),
     ((134, 1), 1, False), ((2, 137), 2, False), ((139, 75), 139, False)],
)  # fmt: skip
def test_a_slurm_job_ends_if_one_process_would_fail_again(tmp_path, statuses, expected, again):
    """srun tells the highest status: a refusal (2) beside what passes (75) was queued for ever."""
    srun = (
        "shift\nhighest=0\n"
        'for SLURM_PROCID in 0 1; do\n  export SLURM_PROCID\n  "$@"\n  status=$?\n'
        "  [ $status -le $highest ] || highest=$status\ndone\nexit $highest"
    )
    python = "set -- $STATUSES\nshift $SLURM_PROCID\nexit $1"
    code, out = job(tmp_path, srun, python, STATUSES=" ".join(map(str, statuses)))
    assert code == expected and out == ("requeue 77\n" if again else "")


def test_a_process_of_a_slurm_job_gets_the_signal_and_has_the_time_to_save(tmp_path):
    """SLURM sends it to the shell around main, too."""
    body = 'trap "sleep 0.3; exit 75" TERM\nkill -TERM $PPID $$\nwait\nexit 1'
    assert job(tmp_path, 'shift\nexec "$@"', body) == (75, "requeue 77\n")
