# SPDX-License-Identifier: Apache-2.0
"""The palette codec in the task: trained like any other, read as classes, stored with its colors."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from digseg_jax.config.sampling import EStep
from digseg_jax.data.datasets.landcover import GROUPS
from digseg_jax.errors import UserError
from digseg_jax.evaluation.job import evaluate
from digseg_jax.io.checkpoint import Checkpointer
from digseg_jax.io.workdir import CALIBRATION
from digseg_jax.prediction.pretrained import load_segmenter
from digseg_jax.segmentation.ensemble import probabilities
from digseg_jax.training.tasks.base import example_keys
from digseg_jax.training.tasks.segmentation import SegmentationTask


@pytest.fixture(scope="module")
def config(folders):
    return tiny.config(
        folders, model__codec="palette", eval__num_images=1, eval__batch_size=1,
        eval__ensemble=2, eval__calibrate=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def task(config):
    task = SegmentationTask(config)
    task.prepare()
    return task


@pytest.fixture(scope="module")
def params(task):
    return jax.tree.map(jnp.asarray, task.initial())


def test_the_loss_and_its_gradient_are_finite_and_need_one_query(task, params):
    batch = {k: jnp.asarray(v) for k, v in tiny.batch(2).items()}
    keys = example_keys(0, batch["index"])
    grad = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
    (loss, _), grads = grad(params, task.frozen, batch, keys)
    assert np.isfinite(loss) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    other = batch | {"query": batch["query"] + 1, "query_class": 0 * batch["query_class"]}
    np.testing.assert_array_equal(grad(params, task.frozen, other, keys)[0][0], loss)
    assert task.frozen["bank"]["tokens"].shape[0] == 1


def test_evidence_names_every_class_and_members_differ(task, params):
    image = jnp.asarray(tiny.batch(2)["image"])
    ask = jax.jit(lambda p, f, i: task.evidence(p, f, i, jnp.arange(2), EStep(2, 1)))
    evidence = ask(params, task.frozen, image)
    assert evidence.shape == (2, len(GROUPS), 2, tiny.SIZE, tiny.SIZE)
    assert (np.asarray(evidence[:, :, 0]) != np.asarray(evidence[:, :, 1])).any()
    probability = probabilities(evidence, task.codec.scale, jnp.zeros(8), exclusive=True)
    np.testing.assert_allclose(np.asarray(probability).sum(axis=1), 1.0, rtol=1e-4)


def test_without_a_decoder_the_nearest_color_is_read(task):
    classes = np.arange(8).reshape(1, 1, 2, 4).repeat(4, 2).repeat(2, 3)  # [n, e, h, w] of cells
    latents = jnp.asarray(task.codec.color_latents[classes])[:, None]
    evidence = task.read(task.frozen, latents, (tiny.SIZE, tiny.SIZE), "probe")
    assert evidence.shape == (1, len(GROUPS), 1, tiny.SIZE, tiny.SIZE)
    found = np.asarray(probabilities(evidence, task.codec.scale, jnp.zeros(8), exclusive=True))
    factor = tiny.SIZE // classes.shape[-1]
    middle = slice(factor // 2, None, factor)  # of the cells: between them it is interpolated
    np.testing.assert_array_equal(found[0].argmax(axis=0)[middle, middle], classes[0, 0])


def test_the_colors_are_known_before_a_program_is_traced(config, task):
    """Tracing for a mesh would take the autoencoder's attention for a part of the program."""
    again = SegmentationTask(config)
    latents = jnp.zeros((1, 1, 1, 8, 8, 4))

    def read():
        size = (tiny.SIZE, tiny.SIZE)
        return jax.eval_shape(lambda x: again.read(again.frozen, x, size), latents)

    with pytest.raises(RuntimeError, match="call prepare"):
        read()
    again.prepare()
    assert read().shape[1] == len(GROUPS)
    np.testing.assert_array_equal(again.codec.palette.colors, task.codec.palette.colors)


def test_the_palette_is_stored_with_the_weights_and_adopted(config, task, tmp_path):
    task.export(jax.device_get(task.initial()), tmp_path, {"task": "test"})
    assert (tmp_path / "palette.json").is_file()
    again = SegmentationTask(config)
    again.adopt(tmp_path)
    np.testing.assert_array_equal(again.codec.palette.prototypes, task.codec.palette.prototypes)
    (tmp_path / "palette.json").unlink()
    with pytest.raises(UserError, match="not trained with a palette"):
        again.adopt(tmp_path)


def test_weights_of_a_checkpoint_come_with_its_colors(config, task, tmp_path):
    """Found anew on other hardware, colors may differ; other classes have colors of their own."""
    trainer = tiny.trainer(config, SegmentationTask(config), tiny.mesh(), tmp_path)
    colors = trainer.task.constants()
    stored = colors | {"colors": np.asarray(colors["colors"])[::-1].tolist()}
    few = {name: value[:-1] if name == "colors" else value for name, value in colors.items()}
    with Checkpointer(str(tmp_path), config.checkpoint) as checkpointer:
        _, state = trainer.start_state(checkpointer)
        checkpointer.save(1, state, {"constants": stored})
        checkpointer.save(2, state, {"constants": few})

    # The newest has another number of colors: only its weights are taken.
    trainer.weights_of(str(tmp_path))
    np.testing.assert_array_equal(trainer.task.constants()["colors"], colors["colors"])
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    trainer.weights_of(str(tmp_path))
    np.testing.assert_array_equal(trainer.task.constants()["colors"], stored["colors"])


def test_the_stored_scale_of_an_evaluation_is_none_of_a_palette_s(config, task, tmp_path):
    """It follows from the colors; of a good autoencoder it is above what a fit gives."""
    tiny.export(config, tmp_path)
    values = {"scale": 250.0, "bias": [0.0] * len(GROUPS), "split": "val"}
    (tmp_path / CALIBRATION).write_text(json.dumps(values))
    assert load_segmenter(tmp_path).scale == pytest.approx(task.codec.scale)


def test_it_is_evaluated_like_the_other_codec(config, task, params, cover, tmp_path):
    results = evaluate(config.data, config.eval, config.seed, task, params, tiny.mesh(), tmp_path)
    assert np.sum(results["confusion"]) == 128 * 128
    assert results["calibration"]["scale"] == pytest.approx(task.codec.scale)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"data__mixture": ({"name": "camvid", "root": "x"},)}, "config.data.mixture"),
    ],
)  # fmt: skip
def test_what_a_palette_cannot_do_is_told_at_the_start(folders, change, named):
    with pytest.raises(UserError) as caught:
        SegmentationTask(tiny.config(folders, model__codec="palette", **change))
    assert named in tiny.one_line(caught.value)
