# SPDX-License-Identifier: Apache-2.0
"""The launchers: clean for shellcheck, a dry run that prints the commands, a local pod that runs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from launched import FLAGS, LAUNCH, SETTINGS, TOKEN, dry, fake, refused, run
from pod import ROOT

OTHERS = {"local_pod.sh", "prepare_host.sh", "tpu_host.sh", "common.sh"}


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    scripts = sorted(map(str, LAUNCH.glob("*.sh")))
    done = subprocess.run(["shellcheck", "-x", *scripts], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", [*SETTINGS, "local_pod.sh", "prepare_host.sh"])
def test_without_arguments_the_head_of_the_script_is_shown(script):
    done = run(script)
    assert done.returncode == 2
    assert f"launch/{script}" in done.stderr
    assert script == "prepare_host.sh" or "--dry-run" in done.stderr


@pytest.mark.parametrize("script", [name for name in SETTINGS if name != "slurm.sh"])
def test_a_missing_setting_is_named(script):
    """SLURM has a default for each of its own."""
    for name in SETTINGS[script]:
        rest = {k: v for k, v in SETTINGS[script].items() if k != name}
        done = run(script, "--dry-run", *FLAGS, **rest)
        assert done.returncode == 2 and f"error: set {name} " in done.stderr


OPTIONAL = {
    "tpu_vm.sh": ["PROJECT"],
    "queued_resource.sh": ["PROJECT"],
    "gke_jobset.sh": ["SLICES", "RESTARTS", "SERVICE_ACCOUNT"],
    "slurm.sh": ["TIME", "PARTITION", "ACCOUNT", "RESTARTS", "CPUS", "MEM"],
}


@pytest.mark.parametrize("script", SETTINGS)
@pytest.mark.parametrize("value", ["--quiet", "a\n#SBATCH --wrap=b", "a b"])
def test_a_setting_that_another_program_would_read_as_more_is_refused(script, value):
    for name in {*SETTINGS[script], *OPTIONAL[script]} - {"VENV"}:
        done = run(script, "--dry-run", *FLAGS, **{**SETTINGS[script], name: value})
        assert refused(done).startswith(f"error: {name}=")


def test_tpu_vm_runs_the_same_command_on_every_host():
    *_, last = dry("tpu_vm.sh").splitlines()
    words = shlex.split(last.replace("$'", "'").replace("\\n", " ; ").replace("\\'", "'\\''"))
    assert words[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice"]
    assert "--worker=all" in words and "launch/tpu_host.sh" in words[-1] and FLAGS[0] in words[-1]


@pytest.fixture
def tree(tmp_path):
    """A checkout as one is worked in: an environment, runs, keys, a removed and a changed file."""
    tree = tmp_path / "tree"
    shutil.copytree(LAUNCH, tree / "launch")
    for name in ("digseg_jax/main.py", "digseg_jax/gone.py", "configs/a.py", "requirements.txt",
                 "requirements-data.txt", "pyproject.toml", "README.md", "LICENSE",
                 "digseg_jax/__pycache__/main.pyc"):  # fmt: skip
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(name)
    (tree / ".gitignore").write_text(".venv/\nruns/\n__pycache__/\n")
    git = ["git", "-C", str(tree), "-c", "user.name=t", "-c", "user.email=t@t"]
    git += ["-c", "commit.gpgsign=false"]
    subprocess.run([*git[:3], "init", "-q"], check=True)
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "m"], check=True)
    for name in (".venv/bin/python", "runs/r/checkpoints/1", ".env", "key.json", "configs/new.py"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("secret")
    (tree / "digseg_jax" / "gone.py").unlink()
    (tree / "digseg_jax" / "main.py").write_text("changed")
    return tree


def copied(tree, tmp_path, *flags) -> tuple[subprocess.CompletedProcess, dict[str, bytes]]:
    """What a real run of tpu_vm.sh hands to scp, and how it went."""
    path = fake(tmp_path / "bin", gcloud='[ "$4" != scp ] || cp "$5" "$OUT"')
    archive = tmp_path / "out.tar.gz"
    settings = {**SETTINGS["tpu_vm.sh"], "PATH": path, "OUT": str(archive)}
    done = run("tpu_vm.sh", *flags, folder=tree / "launch", **settings)
    if done.returncode:
        return done, {}
    with tarfile.open(archive) as tar:
        return done, {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}


def test_hosts_get_what_git_tracks_as_it_is_here_and_no_keys(tree, tmp_path):
    done, files = copied(tree, tmp_path, "--config=configs/a.py")
    assert done.returncode == 0, done.stderr
    assert files["digseg_jax/main.py"] == b"changed" and "configs/a.py" in files
    assert {"launch/prepare_host.sh", "requirements-data.txt"} <= files.keys()
    assert not [name for name, text in files.items() if text == b"secret" or "gone" in name]
    assert f"# copied: {len(files)} files" in done.stdout
    assert "# not copied: 3 files that git does not track" in done.stdout and ".env" in done.stdout


def test_a_dry_run_shows_what_would_be_copied(tree, tmp_path):
    settings = SETTINGS["tpu_vm.sh"]
    done = run("tpu_vm.sh", "--dry-run", "--config=configs/a.py", folder=tree / "launch", **settings)
    assert done.returncode == 0 and "# copied: " in done.stdout and "#   configs/a.py" in done.stdout
    assert "tar -czf" in done.stdout


def test_a_configuration_that_would_be_left_behind_is_told(tree, tmp_path):
    done, _ = copied(tree, tmp_path, "--config=configs/new.py:sd21")
    assert "git add configs/new.py" in refused(done)


def test_without_git_hosts_get_the_folders_that_a_run_needs(tree, tmp_path):
    shutil.rmtree(tree / ".git")
    done, files = copied(tree, tmp_path, "--config=configs/new.py")
    assert done.returncode == 0, done.stderr
    assert {"digseg_jax/main.py", "configs/new.py", "launch/prepare_host.sh"} <= files.keys()
    assert not {name for name in files if name.startswith((".", "runs", "key")) or "pycache" in name}


class TestPrepareHost:
    """A host made of fake commands: what it runs is in a log, one command a line."""

    OLD = '[ "$1" != -c ] || exit 1'  # too old, or without venv
    # a whole Python: its environments hold one too
    NEW = (
        'echo "new $*" >> "$LOG"\n'
        'if [ "$2" = venv ]; then mkdir -p "$4/bin"; cp "$0" "$4/bin/python"; fi'
    )

    def host(self, tmp_path, **commands):
        """Runs the script where only these commands and a few tools are; returns it and the log."""
        for tool in ("bash", "dirname", "basename", "sed", "mkdir", "cp"):
            (tmp_path / "bin").mkdir(exist_ok=True)
            (tmp_path / "bin" / tool).unlink(missing_ok=True)
            (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
        settings = {"PYTHON": commands.pop("PYTHON", "")}
        commands = {"hostname": "echo here"} | commands
        fake(tmp_path / "bin", **{name.replace("_", "."): body for name, body in commands.items()})
        log, made = tmp_path / "log", str(tmp_path / "a venv")
        env = {"PATH": str(tmp_path / "bin"), "LOG": str(log), "HERE": str(tmp_path), **settings}
        done = run("prepare_host.sh", made, **env)
        return done, log.read_text() if log.exists() else ""

    def installed(self, log):
        *_, first, second = log.splitlines()
        assert "-r requirements.txt jax[tpu]" in first
        return "--no-deps -r requirements-data.txt" in second

    def test_a_new_python_beside_an_old_python3_is_found(self, tmp_path):
        done, log = self.host(tmp_path, python3=self.OLD, python3_11=self.NEW)
        assert done.returncode == 0, done.stderr
        assert "new -m venv --clear" in log and self.installed(log)

    def test_an_environment_that_is_there_is_kept(self, tmp_path):
        self.host(tmp_path, python3=self.NEW)
        (tmp_path / "log").unlink()
        done, log = self.host(tmp_path, python3=self.NEW)
        assert done.returncode == 0 and "venv --clear" not in log and self.installed(log)

    def test_ubuntus_python_3_10_gets_one_from_uv(self, tmp_path):
        """The Python of TPU VM images: pip and uv work there, the project does not."""
        fake(tmp_path / "uv", python=self.NEW)
        old = (
            f'{self.OLD}\necho "old $*" >> "$LOG"\nif [ "$4" = find ]; then echo "$HERE/uv/python"; fi'
        )
        done, log = self.host(tmp_path, python3=old)
        assert done.returncode == 0, done.stderr
        assert "old -m pip install --quiet --user uv\nold -m uv python install 3.12\n" in log
        assert self.installed(log)

    def test_where_uv_cannot_be_had_apt_installs_one(self, tmp_path):
        new = f"#!/bin/sh\n{self.NEW}\n"
        (tmp_path / "new").write_text(new)
        sudo = (
            'echo "sudo $*" >> "$LOG"\n'
            'if [ "$1" = apt-get ]; then cp "$HERE/new" "$HERE/bin/python3.12"; '
            'chmod +x "$HERE/bin/python3.12"; fi'
        )
        done, log = self.host(
            tmp_path, python3="exit 1", sudo=sudo, chmod='exec /bin/chmod "$@"'
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "ppa:deadsnakes/ppa" in log and "python3.12-venv" in log and self.installed(log)

    def test_a_broken_download_does_not_pass_for_a_refusal(self, tmp_path):
        """pip ends with 2 then, which for main is final."""
        done, log = self.host(tmp_path, python3=self.NEW + '\n[ "$2" != pip ] || exit 2')
        assert done.returncode == 1 and "-r requirements.txt" in log.splitlines()[-1]

    def test_nothing_works_is_one_line(self, tmp_path):
        done, log = self.host(tmp_path, python3="exit 1", sudo="exit 1")
        assert done.returncode == 2 and not log
        assert "name it with PYTHON" in done.stderr.splitlines()[-1]

    def test_a_python_that_was_named_must_fit(self, tmp_path):
        done, _ = self.host(tmp_path, python3=self.NEW, old=self.OLD, PYTHON="old")
        assert "PYTHON=old is no Python of 3.11 or newer" in refused(done)
        done, log = self.host(tmp_path, python3=self.OLD, mine=self.NEW, PYTHON="mine")
        assert done.returncode == 0 and self.installed(log)

    @pytest.mark.skipif(shutil.which("python3.10") is None, reason="no Python 3.10 here")
    def test_a_real_python_3_10_does_not_pass(self, tmp_path):
        real = subprocess.run(
            ["python3.10", "-c", "import sys; print(sys.executable)"], capture_output=True, text=True
        )
        if real.returncode:
            pytest.skip("python3.10 does not run here")
        done, _ = self.host(tmp_path, PYTHON=real.stdout.strip())
        assert "no Python of 3.11 or newer" in refused(done)


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke_jobset.sh", "slurm.sh"])
def test_main_gets_one_start_timeout_the_users_if_there_is_one(script):
    assert len(re.findall("--start_timeout=[36]00", dry(script))) == 1
    for flag in ("--start_timeout=1800", "-start_timeout=1800"):
        own = run(script, "--dry-run", *FLAGS, flag, **SETTINGS[script])
        assert own.stdout.count("start_timeout") == own.stdout.count("start_timeout=1800") == 1


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke_jobset.sh", "slurm.sh"])
def test_a_mode_of_one_process_gets_no_start_timeout(script):
    for mode in (["--mode=compile"], ["--mode", "predict"]):
        own = run(script, "--dry-run", *FLAGS, *mode, **SETTINGS[script])
        assert "start_timeout" not in own.stdout
    assert "start_timeout" in run(script, "--dry-run", *FLAGS, "--mode=eval", **SETTINGS[script]).stdout


def test_the_jobset_manifest_is_what_kubernetes_will_read():
    yaml = pytest.importorskip("yaml")
    jobset = yaml.safe_load(dry("gke_jobset.sh"))
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 8
    (container,) = job["template"]["spec"]["containers"]
    assert container["args"] == ["--start_timeout=600", *FLAGS]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    (token,) = container["env"]
    assert token["name"] == TOKEN and len(token["value"]) == 32
    (rule,) = job["podFailurePolicy"]["rules"]
    codes = {"containerName": "main", "operator": "In", "values": [2, 3]}
    assert rule == {"action": "FailJob", "onExitCodes": codes}


def jobset(tmp_path, there: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """A run of gke_jobset.sh where `kubectl get` says this; and what was asked after that."""
    body = 'echo "$1 $2 $3" >> "$OUT"\ncase $1 in get) printf %s "$THERE" ;; apply) cat ;; esac'
    path, out = fake(tmp_path / "bin", kubectl=body), tmp_path / "asked"
    settings = {"PATH": path, "OUT": str(out), "THERE": there, **SETTINGS["gke_jobset.sh"]}
    done = run("gke_jobset.sh", *FLAGS, **settings)
    first, *asked = out.read_text().splitlines()
    assert first == "get jobset r"
    return done, asked


@pytest.mark.parametrize("there", ["", "r Completed", "r Suspended Failed"])
def test_a_jobset_that_has_ended_makes_room(tmp_path, there):
    """Its specification cannot be changed: the same command would be refused."""
    done, asked = jobset(tmp_path, there)
    assert done.returncode == 0 and "kind: JobSet" in done.stdout
    assert asked == ["delete jobset r"] * bool(there) + ["apply -f -"]


@pytest.mark.parametrize("there", ["r", "r StartupPolicyCompleted"])
def test_a_jobset_that_has_not_ended_is_left_alone(tmp_path, there):
    done, asked = jobset(tmp_path, there)
    assert "has not ended" in refused(done) and not asked


def test_a_flag_of_two_lines_is_refused_where_yaml_would_join_them():
    done = run("gke_jobset.sh", "--dry-run", "--config=a\nb", **SETTINGS["gke_jobset.sh"])
    assert "must be one line" in refused(done)


def test_the_image_holds_what_the_jobset_runs_and_nothing_secret():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    words = [line.split() for line in lines if line.startswith("COPY")]
    sources = {source for line in words for source in line[1:-1]}
    assert sources == {"requirements.txt", "requirements-data.txt", "configs", "digseg_jax"}
    assert "WORKDIR /app" in lines and "workingDir: /app" in dry("gke_jobset.sh")
    rules = [r for r in (LAUNCH / "Dockerfile.dockerignore").read_text().split("\n") if r[:1] != "#"]
    assert rules[0] == "*" and {rule[1:] for rule in rules if rule[:1] == "!"} == sources
    assert {"**/__pycache__", "**/.*"} <= set(rules)


def test_no_launcher_is_left_out_here():
    assert {p.name for p in LAUNCH.glob("*.sh")} == {*SETTINGS, *OTHERS}
    assert all(os.access(LAUNCH / name, os.X_OK) for name in {*SETTINGS, *OTHERS} - {"common.sh"})
    assert Path(LAUNCH / "common.sh").read_text().count("PREEMPTED=75") == 1
