# SPDX-License-Identifier: Apache-2.0
"""The part of the rehearsals that always runs: every configuration's scale, and two programs on a mesh.

Lowering for accelerators, default meshes, frozen parts, counts and versions have tests of their own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from experiments import CONFIGS, get_config

from digseg_jax.config.parse import parse
from digseg_jax.config.schema import Config
from digseg_jax.data.datasets import registry
from digseg_jax.evaluation.examples import eval_examples
from digseg_jax.evaluation.suite import SUITES
from digseg_jax.prediction.segmenter import Segmenter, trained_short_side, view_size
from digseg_jax.recipes import VERSIONS
from digseg_jax.training.tasks.segmentation import SegmentationTask
from rehearsal import story, trees

FILES = sorted(path.stem for path in CONFIGS.glob("*.py"))
SIZE = 64
TESTS = Path(__file__).parents[1]


def configurations() -> list[tuple[str, str]]:
    """Each file with each version after its colon."""
    public = [name for name in FILES if name in registry.names() and name != "landcover"]
    rest = [(name, "") for name in FILES if name not in public]
    small = [("camvid", "palette"), ("camvid", "binary"), ("folder", "small")]
    return [(name, version) for name in public for version in VERSIONS] + rest + small


def config_of(name: str, version: str) -> Config:
    return parse(get_config(name, *[version] * bool(version)))


@pytest.mark.parametrize(("name", "version"), configurations())
def test_evaluation_sees_images_at_a_scale_that_training_shows(name, version):
    config = config_of(name, version)
    data = config.data
    if data.scale_unit == "pixel":  # never scaled
        assert view_size(config.eval, data)[0] % data.image_size == 0
        return
    mode = config.eval.inference
    if mode == "auto":
        mode = "window" if data.name == "folder" else registry.spec(data.name).inference
    side = config.eval.short_side or trained_short_side(data)
    side = side if mode == "window" else min(view_size(config.eval, data))
    assert data.scale_min <= side / data.image_size <= data.scale_max


def test_the_closed_and_open_vocabularies_of_the_paper_are_seen_whole():
    """Each image as one square of the training's size, as its protocol has it; streets by windows."""
    whole = {name for name in registry.names() if name != "folder" and is_whole(name)}
    rows = {*SUITES["semantic"], *SUITES["open_vocab"]} - {"cityscapes"}
    assert rows <= whole and not {"cityscapes", "bdd100k", "camvid", "phenobench"} & whole
    for name in rows:
        assert config_of(name, "").eval.inference == "auto"


def is_whole(name: str) -> bool:
    return registry.spec(name).inference == "whole"


@pytest.mark.parametrize("name", story.DATASETS)
def test_a_rehearsals_data_are_read_as_the_data_set_is(name, tmp_path):
    facts, config = story.DATASETS[name], config_of(name, "")
    trees.write_tree(facts.tree or name, tmp_path)
    data = dataclasses.replace(config.data, root=str(tmp_path))
    examples = eval_examples(data, config.eval.split)
    assert len(examples.classes) == facts.classes
    for i in range(min(len(examples), 2)):
        image, label = examples[i]["image"], examples[i]["label"]
        assert min(image.shape[:2]) > SIZE and label.shape == image.shape[:2]
        assert label.max() >= 0


@pytest.mark.slow  # minutes
def test_the_rehearsal_at_full_size_runs_in_miniature(tmp_path):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS / "parity")])
    }
    command = [sys.executable, "-m", "rehearsal.full_size", str(tmp_path), "--miniature"]
    done = subprocess.run(
        command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {"killed after step 1", "resumed, evaluated", "exported"} <= set(figures)
    for one in ("killed after step 1", "resumed, evaluated", "exported"):
        assert figures[one]["seconds"] > 0 and figures[one]["peak_gb"] > 0


@pytest.fixture
def miniature(sd15_folders) -> Config:
    """configs/phenobench.py on two devices along data and two along fsdp, from miniature folders."""
    config = get_config("phenobench")
    config.data.image_size = SIZE
    config.data.num_queries = 1
    config.train.batch_size = 4
    config.mesh.data, config.mesh.fsdp = 2, 2
    for part, folder in sd15_folders.items():
        config.model[part] = folder
    return parse(config)


@pytest.mark.slow  # the parts alone, lowered for eight devices: tests/aot/test_accelerators.py
def test_a_palette_is_traced_for_a_mesh(miniature, tmp_path):
    """With an autoencoder that has attention, which is a program of its own on several devices."""
    model = dataclasses.replace(miniature.model, codec="palette")
    config = tiny.for_devices(dataclasses.replace(miniature, model=model), jax.devices()[:4])
    task = SegmentationTask(config)
    assert task.vae.config.mid_block_add_attention
    trainer = tiny.trainer(config, task, tiny.mesh(data=2, fsdp=2), tmp_path)
    batch = {
        "image": jax.ShapeDtypeStruct((4, SIZE, SIZE, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((4, SIZE, SIZE), np.int32),
        "query": jax.ShapeDtypeStruct((4, 1), np.int32),
        "query_class": jax.ShapeDtypeStruct((4, 1), np.int32),
        "index": jax.ShapeDtypeStruct((4,), np.uint32),
    }
    traced = trainer.step_fn.trace(trainer.abstract_state, trainer.frozen, batch)
    assert "shard_map" in str(traced.jaxpr)


def test_masks_are_read_by_the_probe_on_a_mesh(miniature):
    config = tiny.for_devices(miniature, jax.devices()[:4])
    settings = dataclasses.replace(config.eval, decoder="probe")
    task = tiny.load_task(config, prompts=("crop",))
    segmenter = Segmenter(task, task.initial(), settings, mesh=tiny.mesh(data=2, fsdp=2))
    image = np.random.default_rng(0).integers(0, 256, (SIZE, 2 * SIZE, 3), np.uint8)
    (masks,) = segmenter.predict_masks([image], ["crop"], ensemble=1, steps=1)
    assert masks.shape == (1, SIZE, 2 * SIZE) and masks.std() > 0.0
