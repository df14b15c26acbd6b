# SPDX-License-Identifier: Apache-2.0
"""The prompted codec in the one engine: trained on any mesh, exported, asked for many names."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from digseg_jax import trees
from digseg_jax.config.sampling import EStep
from digseg_jax.errors import UserError
from digseg_jax.evaluation.job import evaluate
from digseg_jax.models.text_branch import MARKS
from digseg_jax.prediction.pretrained import load_segmenter
from digseg_jax.prediction.request import Request
from digseg_jax.prediction.segmenter import Segmenter
from digseg_jax.runtime import sharding
from digseg_jax.runtime.sharding import infer_shardings, place, place_batch
from digseg_jax.training.optim import make_optimizer
from digseg_jax.training.step import averaged, initial_state
from digseg_jax.training.tasks.segmentation import SegmentationTask

NAMES = 3
CODEC = {"model__codec": "prompted", "data__num_queries": NAMES}


@pytest.fixture(scope="module")
def config(folders):
    return tiny.config(
        folders, **CODEC, data__name_dropout=0.5, loss__mask_weight=0.3, data__text_noise=0.1,
        eval__num_images=1, eval__batch_size=1, eval__ensemble=2, eval__decoder="vae",
        eval__view_size=(64,), train__batch_size=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def task(config):
    task = SegmentationTask(config)
    task.prepare()
    return task


@pytest.fixture(scope="module")
def params(task):
    """Weights without zeros, so that all of them matter."""
    return tiny.without_zeros(jax.device_get(task.initial()))


@pytest.fixture(scope="module")
def segmenter(task, params):
    return Segmenter(task, params, mesh=tiny.mesh())


def noise_image(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)


def losses(task, config, mesh, steps=2):
    """Losses of the first steps on a mesh."""
    task.prepare()
    optimizer = make_optimizer(config.optim, config.train.steps, task.new)
    state = initial_state(task.initial(), optimizer, config.optim)
    shardings = infer_shardings((state, task.frozen), mesh)
    state, frozen = place(state, shardings[0]), place(task.frozen, shardings[1])
    step = tiny.train_step(task, config, mesh, shardings)
    found = []
    for number in range(steps):
        batch = tiny.batch(4, NAMES, seed=number) | {
            "index": np.arange(4, dtype=np.uint32) + 4 * number
        }
        state, metrics = step(state, frozen, place_batch(batch, mesh))
        found.append(float(metrics["loss"]))
    return found


def test_two_steps_on_four_devices_have_the_loss_of_one(config, task, monkeypatch):
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 1)
    alone = losses(task, config, tiny.mesh())
    shared = losses(task, config, tiny.mesh(fsdp=2, tensor=2))
    assert alone[0] != alone[1]
    np.testing.assert_allclose(shared, alone, rtol=1e-5)


def test_only_what_the_colors_are_mapped_by_is_new_and_it_learns(task):
    assert MARKS in task.new and task.unet_config.mark_width == 3 + tiny.VAE.latent_channels
    marks = [path for path in trees.flatten(task.abstract) if path.startswith("mark_embedding")]
    assert marks == ["mark_embedding.bias", "mark_embedding.kernel"]
    assert task.frozen["bank"]["tokens"].shape[1:] == (1, tiny.TEXT_WIDTH)


def test_more_names_than_colors_are_asked_in_groups(segmenter):
    image = noise_image()
    words = ("water", "forest", "snow and ice", "cropland")
    requests = [Request(image, 0, words), Request(image, 0, words[:2])]
    whole, few = (answer.stack() for answer in segmenter.segment(requests, EStep(1, 1)))
    assert whole.shape == (4, 64, 64) and whole.std() > 0
    assert (whole[:3].sum(axis=0) <= 1 + 1e-5).all() and np.isfinite(whole).all()

    # Empty places change nothing: neither as texts nor as colors.
    alone = segmenter.segment([Request(image, 0, words[3:])], EStep(1, 1))[0].stack()
    np.testing.assert_allclose(whole[3], alone[0], atol=1e-6)
    changed = segmenter.segment([Request(image, 0, ("water", "tundra"))], EStep(1, 1))[0].stack()
    assert np.abs(changed[0] - few[0]).max() > 1e-6  # but the other names do: they share an image
    assert segmenter.programs.compiled == 2

    # Templates are averaged as features: still one color for a query.
    request = Request(image, 0, words[:2], templates=("{}", "a {}"))
    ways = segmenter.segment([request], EStep(1, 1))[0].stack()
    assert ways.shape == (2, 64, 64) and np.abs(ways - few).max() > 1e-6


def test_each_member_has_the_colors_shifted_by_one_place(task):
    """What lies between two colors looks like a third: in every member it is another name's."""
    codec = task.codec
    colors = (np.arange(NAMES)[:, None] + np.arange(4)) % NAMES  # by place and member
    latents = jnp.asarray(codec.color_latents[colors.T])[None, None, :, None]  # [1, 1, e, 1, k, c]
    found = codec.in_places(codec.read_latents(latents), 0)[0, :, :, 0].argmax(axis=0)
    np.testing.assert_array_equal(found, [np.arange(NAMES)] * 4)
    later = codec.in_places(codec.read_latents(latents[:, :, 2:]), 2)[0, :, :, 0].argmax(axis=0)
    np.testing.assert_array_equal(later, [np.arange(NAMES)] * 2)

    tokens, mask = jnp.ones((1, NAMES, 1, 4)), jnp.ones((1, NAMES, 1), bool)
    for member in range(4):
        marks = codec.member_context(tokens, mask, member)[0][0, 0, :, 4:]
        np.testing.assert_allclose(marks, codec.marks()[colors[:, member]], atol=1e-6)


def test_members_are_the_same_in_an_ensemble_and_one_by_one(segmenter):
    request, estep = Request(noise_image(2), 0, ("water", "forest")), EStep(3, 2)
    (whole,) = segmenter.segment([request], estep)
    seen = []
    (watched,) = segmenter.segment([request], estep, watch=lambda moment: seen.append(moment.masks()))
    np.testing.assert_allclose(watched.stack(), whole.stack(), atol=1e-4)
    np.testing.assert_allclose(seen[-1].stack(), whole.stack(), atol=1e-4)

    (kept,) = segmenter.segment([request], estep, evidence=True)
    (first,) = segmenter.segment([request], EStep(1, 2), evidence=True)
    members = kept.evidence(0)
    assert members.shape == (3, 64, 64) and np.abs(members[1] - members[0]).max() > 1e-3
    np.testing.assert_allclose(members[:1], first.evidence(0), atol=1e-4)

    # Latents in different colors have no meaning on average: every member is decoded.
    (mean,) = segmenter.segment([request], estep, decoder="latent_mean")
    (every,) = segmenter.segment([request], estep, decoder="vae")
    np.testing.assert_allclose(mean.stack(), every.stack(), atol=1e-5)


def test_an_export_gives_the_same_masks(config, params, segmenter, tmp_path):
    tiny.export(config, tmp_path, change=lambda _: params)
    assert len(json.loads((tmp_path / "prompted.json").read_text())["latents"]) == NAMES + 1
    again = load_segmenter(tmp_path)
    assert again.codec.names == NAMES

    words = ("water", "forest", "snow and ice", "cropland")
    request = Request(noise_image(1), 0, words, templates=again.asks_in())
    (wanted,) = segmenter.segment([request], EStep(1, 1))
    found = again(noise_image(1), words, 1, 1)
    np.testing.assert_allclose(found.probability, wanted.stack(), atol=1e-5)
    assert wanted.stack().std() > 0.01

    (tmp_path / "prompted.json").unlink()
    with pytest.raises(UserError, match="not trained with the prompted codec"):
        load_segmenter(tmp_path)


@pytest.mark.slow
def test_it_is_evaluated_like_the_other_codecs(config, task, params, cover, tmp_path):
    calibrated = dataclasses.replace(config, eval=dataclasses.replace(config.eval, calibrate=True))
    on_device = jax.tree.map(jnp.asarray, params)
    results = evaluate(
        calibrated.data, calibrated.eval, calibrated.seed, task, on_device, tiny.mesh(), tmp_path
    )
    assert np.sum(results["confusion"]) == 128 * 128
    assert results["calibration"]["scale"] == pytest.approx(task.codec.scale)


@pytest.mark.slow
def test_a_run_goes_on_from_its_checkpoint_bit_by_bit(folders, cover, tmp_path):
    def run(folder, steps):
        config = tiny.config(folders, **CODEC, data__name_dropout=0.5, train__steps=steps,
                             optim__schedule="constant", checkpoint__every=2)  # fmt: skip
        return averaged(tiny.trainer(config, SegmentationTask(config), tiny.mesh(), folder).run())

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "halves", 2)
    halves = run(tmp_path / "halves", 4)
    assert all(map(np.array_equal, jax.tree.leaves(whole), jax.tree.leaves(halves)))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"data__word_dropout": 0.5}, "config.data.word_dropout=0.5"),
        ({"model__codec": "binary", "data__name_dropout": 0.5}, "config.data.name_dropout=0.5"),
    ],
)
def test_what_it_does_not_use_is_told(folders, change, named):
    with pytest.raises(UserError) as caught:
        tiny.config(folders, **(CODEC | change))
    assert named in tiny.one_line(caught.value)
