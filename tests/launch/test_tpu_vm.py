# SPDX-License-Identifier: Apache-2.0
"""A run on a TPU VM slice whose hosts are folders: what each host does, and what its end means."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest
from launched import LAUNCH, PLAIN, SETTINGS, TOKEN, fake, run

# Both hosts at once, as gcloud has it: a session that is cut (255) is opened again, and the status is
# the one of the first host that failed. CUT: when the first session of host 0 is cut.
GCLOUD = r"""
for last; do :; done
session() {
  export HOME="$HOSTS/host $1"
  if [ "$4" = scp ]; then cp "$2" "$HOME/digseg_jax.tar.gz"; return; fi
  case "$CUT-$1" in
    running-0)
      setsid bash -c "$3" & pid=$!
      until [ -e "$HOME/starts" ]; do sleep 0.05; done
      kill -KILL "-$pid"
      bash -c "$3" > "$HOME/said" & pid=$!
      while kill -0 $pid && ! grep -q "same command" "$HOME/said"; do sleep 0.05; done
      touch "$HOME/go"
      wait $pid; set -- $?; cat "$HOME/said"; return $1 ;;
    ended-0) bash -c "$3" > /dev/null ;;
  esac
  bash -c "$3"
}
session 0 "$5" "${last#--command=}" "$4" & first=$!
session 1 "$5" "${last#--command=}" "$4" & second=$!
wait $first; first=$?
wait $second; second=$?
[ $first -eq 0 ] || exit $first
exit $second
"""
PREPARE = '#!/bin/sh\nmkdir -p "$1/bin"\necho \'PATH="$HOME/bin:$PATH"\' > "$1/bin/activate"\n'
# bounded: it runs apart from the test, which may fail
WAIT = 'n=0; until [ -e "$HOME/go" ] || [ $n -gt 2000 ]; do n=$((n + 1)); sleep 0.05; done'
FLAGS = ["--config=configs/a.py", "--workdir=gs://bucket/a run's"]


class Slice:
    """A tree, two hosts whose main is `main`, a line of shell, and the scripts' environment."""

    def __init__(self, folder: Path, main: str = "exit 0", **settings: str):
        self.tree = folder / "a tree"
        shutil.copytree(LAUNCH, self.tree / "launch")
        (self.tree / "launch" / "prepare_host.sh").write_text(PREPARE)
        for name in ("digseg_jax/main.py", "digseg_jax/old.py", "configs/a.py", "requirements.txt",
                     "pyproject.toml", "README.md", "LICENSE"):  # fmt: skip
            (self.tree / name).parent.mkdir(exist_ok=True)
            (self.tree / name).write_text(name)
        self.hosts = [folder / "host 0", folder / "host 1"]
        body = f'printf "%s|" "${TOKEN}" "$@" >> "$HOME/starts"; echo >> "$HOME/starts"\n{main}'
        for host in self.hosts:
            host.mkdir()
            fake(host / "bin", python=body)
        path = fake(folder / "bin", gcloud=GCLOUD)
        self.settings = {**SETTINGS["tpu_vm.sh"], "PATH": path, "HOSTS": str(folder), **settings}

    def run(self, *flags: str) -> subprocess.CompletedProcess:
        return run("tpu_vm.sh", *(flags or FLAGS), folder=self.tree / "launch", **self.settings)

    def begin(self) -> subprocess.Popen:
        """The same in the background, up to the start of main on both hosts."""
        command = [str(self.tree / "launch" / "tpu_vm.sh"), *FLAGS]
        pipe = subprocess.PIPE
        begun = subprocess.Popen(command, env=PLAIN | self.settings, stdout=pipe, text=True)
        end = time.monotonic() + 60
        while not all((host / "starts").exists() for host in self.hosts):
            assert time.monotonic() < end, "main did not start"
            time.sleep(0.02)
        return begun

    def go(self) -> None:
        for host in self.hosts:
            (host / "go").touch()

    def starts(self) -> list[int]:
        return [len((host / "starts").read_text().splitlines()) for host in self.hosts]


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [((0, 0), 0), ((134, 2), 2), ((75, 3), 3), ((134, 75), 75), ((75, 1), 1), ((0, 75), 75)],
)
def test_the_host_that_decides_is_not_hidden_behind_the_first(tmp_path, statuses, expected):
    slice = Slice(tmp_path, 'exit "$(cat "$HOME/will")"')
    for host, status in zip(slice.hosts, statuses, strict=True):
        (host / "will").write_text(str(status))
    done = slice.run()
    assert done.returncode == expected, done.stdout + done.stderr
    first, second = [(host / "starts").read_text().strip().split("|") for host in slice.hosts]
    assert first == second and len(first[0]) == 32  # the token
    assert first[1:-1] == ["-u", "-m", "digseg_jax.main", "--start_timeout=300", *FLAGS]


def test_a_session_that_is_cut_finds_main_running(tmp_path):
    slice = Slice(tmp_path, f"echo first line; {WAIT}; echo last line; exit 75", CUT="running")
    (slice.hosts[1] / "go").touch()
    done = slice.run()
    assert done.returncode == 75, done.stdout + done.stderr
    assert slice.starts() == [1, 1]
    assert done.stdout.count("last line\n") == 2 and "the same command is running" in done.stdout


def test_a_session_that_is_cut_when_main_ends_gets_its_status(tmp_path):
    slice = Slice(tmp_path, "exit 2", CUT="ended")
    assert slice.run().returncode == 2 and slice.starts() == [1, 1]


def test_the_same_command_follows_a_run_and_another_one_leaves_it_alone(tmp_path):
    slice = Slice(tmp_path, f"{WAIT}; exit 75")
    with slice.begin() as begun:
        other = slice.run(*FLAGS, "--accept_changes")
        assert other.returncode == 69 and begun.poll() is None
        assert other.stderr.count("another command is running here: --start_timeout=300 --config") == 2
        with slice.begin() as again:
            told = (line for line in again.stdout if "the same command is running here" in line)
            assert next(told) and next(told)  # both hosts
            slice.go()
            again.communicate(timeout=60)
        begun.communicate(timeout=60)
    assert (begun.returncode, again.returncode, slice.starts()) == (75, 75, [1, 1])
    assert slice.run().returncode == 75 and slice.starts() == [2, 2]  # it has ended: started again


def test_files_that_left_the_tree_leave_the_hosts(tmp_path):
    slice = Slice(tmp_path)
    assert slice.run().returncode == 0
    copies = [host / "digseg_jax" for host in slice.hosts]
    for copy in copies:
        assert (copy / "digseg_jax" / "old.py").exists()
        (copy / "runs").mkdir()  # not from the tree: stays
    (slice.tree / "digseg_jax" / "old.py").unlink()
    assert slice.run().returncode == 0
    for copy in copies:
        assert {path.name for path in (copy / "digseg_jax").iterdir()} == {"main.py"}
        assert (copy / "runs").is_dir()


def test_a_signal_to_all_that_names_main_lets_it_save(tmp_path):
    """`pkill -f` finds the shell around main, too."""
    body = 'trap "sleep 0.3; exit 75" TERM\nkill -TERM $PPID $$\nwait\nexit 1'
    assert Slice(tmp_path, body).run().returncode == 75


def test_a_run_that_was_killed_with_its_shell_has_the_status_of_a_kill(tmp_path):
    done = Slice(tmp_path, "kill -KILL $PPID $$").run()
    assert done.returncode == 137, done.stdout + done.stderr
