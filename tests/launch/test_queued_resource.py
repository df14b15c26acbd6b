# SPDX-License-Identifier: Apache-2.0
"""Queued resources: when one is asked for, taken over and deleted, and when the script ends."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launched import LAUNCH, PLAIN, SETTINGS, dry, fake, run

DELETE = "gcloud compute tpus queued-resources delete r --zone=z --quiet --force"
OURS = r"*nodeSpec*) printf 'r\tv6e-8\n'"  # node and type of a resource that this script has made


def stand_ins(tmp_path: Path, look: str = "exit 1", **verbs: str) -> tuple[dict[str, str], Path]:
    """Settings with a gcloud of these verbs, and the file of what is asked; look: the describe before
    the first create."""
    cases = "".join(f"{verb}) {body} ;;\n" for verb, body in {"look": look, **verbs}.items())
    body = (
        'verb=$4\nif [ $verb = describe ] && ! grep -qs create "$OUT"; then verb=look; fi\n'
        f'echo "$verb $5" >> "$OUT"\ncase "$verb" in\n{cases}esac'
    )
    path, out = fake(tmp_path / "bin", gcloud=body, sleep="exit 0"), tmp_path / "asked"
    return {**SETTINGS["queued_resource.sh"], "PATH": path, "OUT": str(out), "ATTEMPTS": "5"}, out


def queued(
    tmp_path: Path, describe: str = "echo ACTIVE", *, more: dict[str, str] | None = None, **verbs: str
) -> tuple[subprocess.CompletedProcess, list[str]]:
    """A run of queued_resource.sh with such a gcloud; and the verbs that were asked."""
    settings, out = stand_ins(tmp_path, describe=describe, **verbs)
    done = run("queued_resource.sh", "--workdir=gs://b/r", **settings, **(more or {}))
    return done, [line.split()[0] for line in out.read_text().splitlines()]


def nth(verb: str, number: int) -> str:
    return f'[ "$(grep -c "^{verb}" "$OUT")" = {number} ]'


def test_queued_resource_waits_through_a_look_that_fails(tmp_path):
    describe = '[ "$(grep -c describe "$OUT")" -gt 3 ] || exit 1; echo ACTIVE'
    done, asked = queued(tmp_path, describe)
    assert done.returncode == 0, done.stdout + done.stderr
    assert asked == ["look", "create", *["describe"] * 4, "scp", "ssh", "delete"]
    assert DELETE not in done.stderr


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_a_slice_that_was_never_had_is_removed_and_asked_for_again(tmp_path, state):
    done, asked = queued(tmp_path, f"{nth('describe', 1)} && echo {state} || echo ACTIVE")
    assert done.returncode == 0, done.stdout + done.stderr
    again = ["create", "describe", "scp", "ssh", "delete"]
    assert asked == ["look", "create", "describe", "delete", *again]


@pytest.mark.parametrize("status", [2, 3])
def test_what_would_fail_on_the_next_slice_too_ends_it(tmp_path, status):
    done, asked = queued(tmp_path, ssh=f"exit {status}")
    assert done.returncode == status, done.stdout + done.stderr
    assert asked[-1] == "delete" and asked.count("create") == 1


@pytest.mark.parametrize(
    ("fails", "status", "verbs"),
    [
        (1, 1, ["create"]),  # a wrong setting: at once
        (2, 0, ["create", "describe", "scp", "ssh", "delete", "create", "delete", "create"]),
    ],
)
def test_queued_resource_outlives_a_create_that_fails_after_a_preemption(
    tmp_path, fails, status, verbs
):
    done, asked = queued(
        tmp_path,
        create=f"if {nth('create', fails)}; then exit 1; fi",
        ssh=f"if {nth('ssh', 1)}; then exit 75; fi",
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert asked[: len(verbs) + 1] == ["look", *verbs]


def test_queued_resource_ends_when_the_state_is_never_told(tmp_path):
    more = {"MISSES": "3"}
    done, asked = queued(tmp_path, "echo no permission >&2; exit 1", more=more)
    assert done.returncode == 1 and asked == ["look", "create", *["describe"] * 3, "delete"]
    assert "no permission" in done.stderr and "3 times in a row" in done.stderr.splitlines()[-1]


def test_a_resource_that_is_there_is_taken_over(tmp_path):
    """So a second start goes on after Ctrl-C or a restart of the machine: `create` would fail."""
    done, asked = queued(tmp_path, look=f'case "$*" in {OURS} ;; *) echo ACTIVE ;; esac')
    assert done.returncode == 0, done.stdout + done.stderr
    assert asked == ["look", "look", "look", "scp", "ssh", "delete"]
    assert "r is there already: taken over" in done.stdout


def test_a_resource_that_is_being_deleted_is_waited_for(tmp_path):
    done, asked = queued(tmp_path, look=f"{nth('look', 3)} && exit 1; echo DELETING")
    assert done.returncode == 0, done.stdout + done.stderr
    assert asked == [*["look"] * 3, "create", "describe", "scp", "ssh", "delete"]


def test_a_resource_of_another_kind_is_left_alone(tmp_path):
    other = OURS.replace("v6e-8", "v6e-32")
    done, asked = queued(tmp_path, look=f'case "$*" in {other} ;; *) echo ACTIVE ;; esac')
    assert done.returncode == 2 and asked == ["look", "look"]
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "r, v6e-32" in line


def test_a_slice_on_which_another_command_runs_is_not_deleted(tmp_path):
    done, asked = queued(tmp_path, ssh="exit 69")
    assert done.returncode == 69 and asked[-1] == "ssh"
    assert done.stderr.splitlines()[-1].strip() == DELETE


def test_a_slice_that_could_not_be_deleted_is_told(tmp_path):
    done, _ = queued(tmp_path, delete="exit 1")
    assert done.returncode == 0 and done.stderr.splitlines()[-1].strip() == DELETE


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_ends_the_script_is_told_how_to_delete_what_is_billed(tmp_path, number):
    settings, out = stand_ins(tmp_path, describe="echo ACTIVE", ssh="exec /bin/sleep 60")
    command = [str(LAUNCH / "queued_resource.sh"), "--workdir=gs://b/r"]
    with subprocess.Popen(
        command, env=PLAIN | settings, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as begun:  # fmt: skip
        end = time.monotonic() + 60
        while not out.exists() or "ssh" not in out.read_text():
            assert time.monotonic() < end, "it did not come to ssh"
            time.sleep(0.02)
        os.killpg(begun.pid, number)  # as a terminal does
        told = begun.communicate(timeout=50)[1]
    assert begun.returncode == 128 + number and told.splitlines()[-1].strip() == DELETE
    assert "delete" not in out.read_text()


def test_queued_resource_asks_runs_and_gives_back():
    text = dry("queued_resource.sh")
    wanted = ("queued-resources create r", "tpu-vm ssh r", "queued-resources delete r")
    places = [text.index(command) for command in wanted]
    assert places == sorted(places) and "--spot" in text
