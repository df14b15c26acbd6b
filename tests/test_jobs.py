# SPDX-License-Identifier: Apache-2.0
"""A run's jobs: what is checked at its start, and what is exported beside it and after it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from PIL import Image
from safetensors import safe_open

from digseg_jax import jobs
from digseg_jax.config.parse import parse, to_dict
from digseg_jax.errors import UserError
from digseg_jax.io.checkpoint import Checkpointer
from digseg_jax.io.workdir import claim
from digseg_jax.training.setup import TASKS

HOLDS = """
import sys, time
from pathlib import Path
from digseg_jax.io.workdir import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_an_export_waits_for_no_run_that_trains_there(tmp_path):
    """Its weights of an earlier step took the place of the final ones."""
    claim(tmp_path, to_dict(parse({})))
    other = subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError) as caught:
            jobs.export(tmp_path)
        assert f"{tmp_path}: process {other.pid} on " in tiny.one_line(caught.value)
        assert "trains there" in str(caught.value) and not (tmp_path / "export").exists()
    finally:
        other.kill()
        other.wait()
        other.stdout.close()


def test_an_export_needs_no_devices_of_its_training(tmp_path, monkeypatch):
    """A pod's mesh and batch say nothing about the machine that exports, unless it is asked."""
    trained = parse({"mesh": {"data": 4, "fsdp": 8}, "compute": {"accumulation": 8}})
    claim(tmp_path, to_dict(trained))
    seen = []

    def set_up(config, task):
        seen.append(config)
        raise UserError("enough")

    monkeypatch.setattr(jobs, "set_up", set_up)
    for config in (None, trained):
        with pytest.raises(UserError, match="enough"):
            jobs.export(tmp_path, config)
    assert dataclasses.astuple(seen[0].mesh)[:3] == (-1, 0, 1) and seen[0].compute.accumulation == 0
    assert seen[1] == trained


def test_older_weights_never_replace_newer_ones(tmp_path, monkeypatch):
    export = tmp_path / "export"
    export.mkdir()
    (export / jobs.DESCRIPTION).write_text("{}")
    monkeypatch.setattr(jobs, "read_description", lambda folder: SimpleNamespace(steps=400))
    jobs.check_not_older(tmp_path, "checkpoints/400")
    with pytest.raises(UserError, match="weights of step 400, newer than checkpoints/280"):
        jobs.check_not_older(tmp_path, "checkpoints/280")


def photos(root, *splits):
    """A folder of two images a split, with their masks."""
    rng = np.random.default_rng(0)
    for split in splits:
        for kind, shape in (("images", (40, 48, 3)), ("masks", (40, 48))):
            (root / kind / split).mkdir(parents=True)
            for i in range(2):
                values = rng.integers(0, 256 if kind == "images" else 2, shape, np.uint8)
                Image.fromarray(values).save(root / kind / split / f"{i}.png")
    (root / "classes.txt").write_text("soil\nroad\n")
    return str(root)


def autoencoder(folders, root, steps=0, **changes):
    """A training of a tiny autoencoder on a folder; without steps, it ends with its initial weights."""
    return tiny.config(
        folders, task="autoencoder", data__name="folder", data__root=root, train__steps=steps, **changes
    )


def exported(workdir):
    """What the file of an exported autoencoder says of itself."""
    with safe_open(workdir / "export/diffusion_pytorch_model.safetensors", "np") as file:
        return file.metadata()


class TestAutoencoder:
    """Its round trip is measured on the held-out images that the data set has."""

    def test_a_data_set_without_a_test_split_is_scored_on_its_val(self, folders, tmp_path):
        """It was trained to the end, and then neither scored nor exported."""
        root = photos(tmp_path / "data", "train", "val")
        jobs.train(autoencoder(folders, root), tmp_path / "run")
        results = json.loads((tmp_path / "run/eval/results.json").read_text())
        assert results["split"] == "val" and results["per_class"].keys() == {"soil", "road"}
        told = exported(tmp_path / "run")
        assert told["round_trip_mask_iou"] == f"{results['mask_iou']:.4f}"

    def test_without_held_out_images_nothing_is_trained(self, folders, tmp_path):
        config = autoencoder(folders, photos(tmp_path / "data", "train"), steps=5)
        with pytest.raises(UserError, match="val"):
            jobs.train(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_weights_are_exported_before_they_are_scored(self, folders, tmp_path, monkeypatch):
        """An image that cannot be read costs the score, not the weights."""

        def damaged(*_):
            raise UserError("a damaged image")

        monkeypatch.setattr(jobs.autoencoder, "round_trip", damaged)
        config = autoencoder(folders, photos(tmp_path / "data", "train", "val"))
        with pytest.raises(UserError, match="a damaged image"):
            jobs.train(config, tmp_path / "run")
        assert exported(tmp_path / "run")["steps"] == "0"

    def test_a_run_that_was_shortened_exports_the_step_that_its_weights_are_of(self, folders, tmp_path):
        """Two steps were asked for, the checkpoint has three: they cannot be taken back."""
        config = autoencoder(folders, photos(tmp_path / "data", "train", "val"), steps=3)
        task = TASKS["autoencoder"](config)
        trainer = tiny.trainer(config, task, tiny.mesh(), tmp_path / "run")
        with Checkpointer(str(tmp_path / "run"), config.checkpoint) as checkpointer:
            _, state = trainer.start_state(checkpointer)
            checkpointer.save(3, state | {"step": state["step"] + 3}, {})
        claim(tmp_path / "run", to_dict(config))

        shorter = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2))
        jobs.train(shorter, tmp_path / "run", accept_changes=True)
        assert exported(tmp_path / "run")["steps"] == "3"
