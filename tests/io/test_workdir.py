# SPDX-License-Identifier: Apache-2.0
"""A working directory belongs to one configuration."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import one_line

from digseg_jax.config.experiment import load_config
from digseg_jax.config.parse import parse, to_dict
from digseg_jax.errors import UserError
from digseg_jax.io.workdir import CONFIG_NAME, LOCK, claim, differences, hold


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_new_directory_is_made_and_the_config_written_down(tmp_path):
    config = parse({"seed": 3})
    claim(tmp_path / "a" / "b", to_dict(config))
    assert parse(json.loads((tmp_path / "a" / "b" / CONFIG_NAME).read_text())) == config
    assert contents(tmp_path / "a" / "b").keys() == {CONFIG_NAME}


def test_the_same_config_is_welcome_again(tmp_path):
    claim(tmp_path, to_dict(parse({})))
    before = contents(tmp_path)
    claim(tmp_path, to_dict(parse({})))
    assert contents(tmp_path) == before


def test_another_config_is_refused_with_the_differing_keys_and_nothing_is_touched(tmp_path):
    claim(tmp_path, to_dict(parse({"train": {"steps": 600}})))
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    before = contents(tmp_path)
    with pytest.raises(UserError) as caught:
        claim(tmp_path, to_dict(parse({"train": {"steps": 700}, "optim": {"b2": 0.8}})))
    message = one_line(caught.value)
    assert "train.steps: 600 -> 700" in message and "optim.b2: 0.99 -> 0.8" in message
    assert str(tmp_path) in message and "seed" not in message
    assert contents(tmp_path) == before


def test_a_run_that_made_nothing_leaves_no_claim(tmp_path):
    wrong, right = parse({"data": {"root": "/nowhere"}}), parse({"data": {"root": "/data"}})
    claim(tmp_path, to_dict(wrong))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    claim(tmp_path, to_dict(right))
    assert parse(json.loads((tmp_path / CONFIG_NAME).read_text())) == right
    (tmp_path / "checkpoints" / "100").mkdir()
    with pytest.raises(UserError, match="data.root: /data -> /nowhere"):
        claim(tmp_path, to_dict(wrong))


@pytest.mark.parametrize(
    "free",
    [
        {"eval": {"ensemble": 8, "sweep": ["4x2"]}},
        {"mesh": {"fsdp": 2}},
        {"logging": {"every": 1, "eval_every": 5}},
        {"compute": {"feed_forward": "plain"}},
        {"loading": {"on_error": "skip"}},
        {"checkpoint": {"every": 7, "keep": 9}},
        {"loading": {"workers": 2}},
    ],
    ids=lambda v: "-".join(v),
)
def test_what_does_not_change_the_training_may_differ_and_is_updated(tmp_path, free):
    claim(tmp_path, to_dict(parse({})))
    claim(tmp_path, to_dict(parse(free)))
    assert parse(json.loads((tmp_path / CONFIG_NAME).read_text())) == parse(free)


def test_a_setting_that_the_run_did_not_know_had_its_default():
    old = to_dict(parse({}))
    del old["optim"]["clip_norm"]
    assert differences(old, to_dict(parse({}))) == []
    changed = to_dict(parse({"optim": {"clip_norm": 2.0}}))
    assert differences(old, changed) == ["optim.clip_norm: 1.0 -> 2.0"]


def test_a_mixture_is_welcome_again_and_its_changed_entries_are_named(tmp_path):
    config = load_config("generalist")
    claim(tmp_path, to_dict(config))
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    claim(tmp_path, to_dict(config))

    parts = config.data.mixture
    louder = dataclasses.replace(parts[3], jitter=1.0, may_show=("thing",))
    data = dataclasses.replace(config.data, mixture=(*parts[:3], louder, *parts[4:]))
    with pytest.raises(UserError) as caught:
        claim(tmp_path, to_dict(dataclasses.replace(config, data=data)))
    told = one_line(caught.value)
    assert "(data.mixture.3.jitter: 0.5 -> 1.0; data.mixture.3.may_show: [" in told


def test_an_entry_of_a_mixture_that_the_run_did_not_know_had_its_default():
    values = to_dict(load_config("generalist"))
    old = json.loads(json.dumps(values))
    for part in old["data"]["mixture"]:
        del part["root"]
    assert differences(old, values) == []


def test_a_setting_that_is_no_more_is_a_difference():
    old = to_dict(parse({}))
    old["optim"]["gone"] = 1
    assert differences(old, to_dict(parse({}))) == ["optim.gone: 1 -> absent"]


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"train": 3}', '{"model_type": "clip"}', ""])
def test_a_config_file_that_is_no_config_is_one_clear_error(tmp_path, text):
    (tmp_path / CONFIG_NAME).write_text(text)
    with pytest.raises(UserError) as caught:
        claim(tmp_path, to_dict(parse({})))
    assert str(tmp_path) in one_line(caught.value)
    assert (tmp_path / CONFIG_NAME).read_text() == text


@pytest.mark.parametrize("name", ["export", "eval", "checkpoints"])
def test_a_file_in_the_place_of_a_folder_of_results_is_told_at_the_start(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} is no folder that can be written") as caught:
        claim(tmp_path, to_dict(parse({})))
    one_line(caught.value)
    assert (tmp_path / name).read_text() == "mine" and not (tmp_path / CONFIG_NAME).exists()


def test_a_directory_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        claim(tmp_path / "file", to_dict(parse({})))
    assert f"--workdir={tmp_path / 'file'}" in one_line(caught.value)


HOLDS = """
import sys, time
from pathlib import Path
from digseg_jax.io.workdir import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_run_at_a_time_until_it_ends_however_it_ends(tmp_path):
    workdir = tmp_path / "run"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(workdir)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError) as caught, hold(workdir):
            pass
        assert f"{workdir}: process {other.pid} on " in one_line(caught.value)
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    with hold(workdir):
        claim(workdir, to_dict(parse({})))
    assert contents(workdir).keys() == {CONFIG_NAME, LOCK}


def test_what_cannot_be_locked_is_for_the_claim_to_explain(tmp_path):
    (tmp_path / "file").write_text("")
    with hold(tmp_path / "file" / "run"), pytest.raises(UserError, match="--workdir="):
        claim(tmp_path / "file" / "run", to_dict(parse({})))


def test_an_evaluation_compares_and_writes_nothing_where_a_configuration_is(tmp_path):
    """A trial on ten images made every later evaluation of the run one of ten images."""
    run, trial = parse({"train": {"steps": 9}}), {"train": {"steps": 9}, "eval": {"num_images": 10}}
    claim(tmp_path, to_dict(run))
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    before = contents(tmp_path)
    claim(tmp_path, to_dict(parse(trial)), keep=True)
    with pytest.raises(UserError, match="train.steps: 9 -> 8"):
        claim(tmp_path, to_dict(parse({"train": {"steps": 8}})), keep=True)
    claim(tmp_path, to_dict(parse({"train": {"steps": 8}})), accept_changes=True, keep=True)
    assert contents(tmp_path) == before
    claim(tmp_path / "new", to_dict(run), keep=True)
    assert contents(tmp_path / "new").keys() == {CONFIG_NAME}
