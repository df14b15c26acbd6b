# SPDX-License-Identifier: Apache-2.0
"""The tasks: finite losses that reach every parameter and do not depend on the mesh."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from digseg_jax import packages, trees
from digseg_jax.diffusion.schedule import Schedule
from digseg_jax.errors import UserError
from digseg_jax.models import functional
from digseg_jax.models.unet import UNet2DConditionModel
from digseg_jax.prediction.description import unet_folder
from digseg_jax.runtime import sharding
from digseg_jax.runtime.sharding import infer_shardings, place, place_batch
from digseg_jax.segmentation.codec import latent_validity
from digseg_jax.training.optim import make_optimizer
from digseg_jax.training.setup import TASKS
from digseg_jax.training.step import initial_state
from digseg_jax.training.tasks.autoencoder import binary_iou, color_error, mask_error
from digseg_jax.training.tasks.base import example_keys, to_unit
from digseg_jax.training.tasks.parts import draw_noise_and_timestep, schedule_from
from digseg_jax.training.tasks.segmentation import SegmentationTask
from digseg_jax.weights import load_component, load_params


@pytest.fixture(scope="module", params=TASKS)
def named_task(request, folders):
    config = tiny.config(folders, task=request.param)
    return config, TASKS[request.param](config)


@pytest.fixture(scope="module")
def segmentation(folders):
    config = tiny.config(folders)
    return config, SegmentationTask(config)


def train(config, task, mesh, steps):
    """Losses of `steps` steps on made-up batches, and the state after the last."""
    optimizer = make_optimizer(config.optim, config.train.steps)
    state = initial_state(task.initial(), optimizer, config.optim)
    shardings, frozen = infer_shardings(state, mesh), infer_shardings(task.frozen, mesh)
    state, frozen_arrays = place(state, shardings), place(task.frozen, frozen)
    step = tiny.train_step(task, config, mesh, (shardings, frozen))
    losses = []
    for i in range(steps):
        batch = place_batch(tiny.batch(seed=i), mesh)
        state, metrics = step(state, frozen_arrays, batch)
        losses.append(float(metrics["loss"]))
    return losses, state


def test_every_parameter_learns(named_task):
    """The adapters' last layer starts at zero, so what is before it learns from the second step."""
    config, task = named_task
    losses, state = train(config, task, tiny.mesh(), 2)
    assert np.isfinite(losses).all()

    # Adam's first moment is the sum of the gradients so far, each with a weight.
    leaves = jax.tree.leaves(state["opt"], is_leaf=lambda node: hasattr(node, "mu"))
    (moments,) = [trees.flatten(leaf.mu) for leaf in leaves if hasattr(leaf, "mu")]
    assert moments.keys() == trees.flatten(state["params"]).keys()
    for path, moment in moments.items():
        assert np.isfinite(moment).all() and float(jnp.abs(moment).max()) > 0, path


def test_the_loss_falls_on_a_batch_seen_again_and_again(segmentation):
    config, task = segmentation
    batch = tiny.batch()
    keys = example_keys(0, batch["index"])
    loss = jax.jit(jax.value_and_grad(lambda p: task.loss(p, task.frozen, batch, keys)[0]))
    params = task.initial()
    values = []
    for _ in range(8):
        value, grads = loss(params)
        values.append(float(value))
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)
    assert values[-1] < values[0]


@pytest.fixture(scope="module")
def one_device(segmentation):
    return train(*segmentation, tiny.mesh(), 3)


MESHES = [
    {"data": 8},
    pytest.param({"data": 1, "fsdp": 8}, marks=pytest.mark.slow),
    {"data": 2, "fsdp": 2, "tensor": 2},
]


class TestMesh:
    """Three steps on one device and on eight simulated ones give the same losses and parameters."""

    @pytest.mark.parametrize("axes", MESHES, ids=json.dumps)
    def test_what_is_learned_does_not_depend_on_the_mesh(
        self, axes, segmentation, one_device, monkeypatch
    ):
        monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 64)  # else nothing this small is split
        mesh = tiny.mesh(**axes)
        losses, state = train(*segmentation, mesh, 3)
        np.testing.assert_allclose(losses, one_device[0], rtol=1e-5, atol=1e-5)
        specs = {str(x.sharding.spec) for x in jax.tree.leaves(state["params"])}
        for axis in ("fsdp", "tensor"):
            assert any(axis in s for s in specs) == (axes.get(axis, 1) > 1)
        expected = trees.flatten(one_device[1]["params"])
        for path, value in trees.flatten(state["params"]).items():
            # Adam's first steps turn rounding in tiny gradients into steps of the learning rate
            difference = np.abs(np.asarray(value) - np.asarray(expected[path]))
            assert difference.max() < 3.1e-3 and difference.mean() < 2e-4, path


class TestIgnoreLabel:
    """Latent cells with an ignored pixel do not count."""

    @pytest.fixture
    def loss(self, segmentation):
        config, task = segmentation
        batch = tiny.batch(4)
        # class 7 is asked for and nowhere present: the masks are the same whatever is ignored
        batch["label"] = np.minimum(batch["label"], 6)
        batch["query_class"] = np.full_like(batch["query_class"], 7)
        params, keys = task.initial(), example_keys(0, batch["index"])
        run = jax.jit(lambda label: task.loss(params, task.frozen, batch | {"label": label}, keys)[0])
        return lambda change: float(run(change(batch["label"].copy())))

    @staticmethod
    def ignore(rows, columns):
        def change(label):
            label[:, rows, columns] = -1
            return label

        return change

    def test_the_whole_is_the_mean_of_its_halves(self, loss):
        every, left, right = slice(None), slice(0, 16), slice(16, None)
        halves = loss(self.ignore(every, right)), loss(self.ignore(every, left))
        assert loss(lambda label: label) == pytest.approx(np.mean(halves), rel=1e-5)
        assert halves[0] != pytest.approx(halves[1], rel=1e-4)

    def test_one_ignored_pixel_takes_its_whole_latent_cell_along(self, loss):
        pixel, cell = self.ignore(5, 9), self.ignore(slice(4, 8), slice(8, 12))
        assert loss(pixel) == loss(cell) != loss(lambda label: label)

    def test_nothing_but_ignored_pixels_is_no_loss_rather_than_nan(self, loss):
        assert loss(lambda label: np.full_like(label, -1)) == 0.0


def test_the_widened_unet_starts_as_the_prior(folders):
    """Where both halves of the input are the same latent, the 8-channel U-Net is the prior."""
    task = SegmentationTask(tiny.config(folders, model__text=tiny.narrow_text(folders),
                                        model__text_adapters=False))  # fmt: skip
    params = task.initial()
    assert params["conv_in"]["kernel"].shape[2] == 8
    prior: UNet2DConditionModel = load_component(folders["unet"])
    latent = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    tokens = jax.random.normal(jax.random.key(1), (2, 5, 8))
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    t = np.array([3, 999])
    got = task.predict_latent(params, latent, latent, t, tokens, mask)
    np.testing.assert_allclose(got, prior(latent, t, tokens, mask), atol=1e-5)


def test_random_initialization_shares_nothing_with_the_prior(folders):
    task = SegmentationTask(tiny.config(folders, model__unet_init="random"))
    prior = trees.flatten(functional.split(load_component(folders["unet"]))[1])
    ours = trees.flatten(task.initial())
    assert (np.asarray(ours["mid_block.resnets.0.conv1.kernel"])
            != np.asarray(prior["mid_block.resnets.0.conv1.kernel"])).all()  # fmt: skip


def test_adapters_start_without_their_mlp_and_everything_else_as_the_prior(segmentation, folders):
    _, task = segmentation
    ours = trees.flatten(task.initial())
    prior = trees.flatten(functional.split(load_component(folders["unet"]))[1])
    for path, value in ours.items():
        if path.startswith("text_adapters."):
            assert path.endswith(".fc2.kernel") is False or not np.any(value), path
        elif not path.startswith("conv_in.kernel"):
            np.testing.assert_array_equal(value, prior[path], err_msg=path)


def test_what_was_exported_loads_again(named_task, tmp_path):
    _, task = named_task
    params = task.initial()
    task.export(params, tmp_path / "export", {"note": "test"})
    again = trees.flatten(load_params(unet_folder(tmp_path / "export"), task.abstract))
    for path, value in trees.flatten(params).items():
        np.testing.assert_array_equal(again[path], value, err_msg=path)


def test_a_frozen_tower_is_an_argument_not_a_constant(segmentation):
    """Another VAE scale gives another loss without building the task anew."""
    config, task = segmentation
    batch = tiny.batch(2)
    keys = example_keys(0, batch["index"])
    loss = jax.jit(lambda frozen: task.loss(task.initial(), frozen, batch, keys)[0])
    scaled = task.frozen | {"vae": jax.tree.map(lambda x: 2 * x, task.frozen["vae"])}
    assert float(loss(task.frozen)) != float(loss(scaled))


def test_the_loss_hears_the_text(segmentation):
    config, task = segmentation
    batch = tiny.batch(2)
    keys = example_keys(0, batch["index"])
    params = task.initial()
    loss = jax.jit(lambda query: task.loss(params, task.frozen, batch | {"query": query}, keys)[0])
    assert float(loss(batch["query"])) != float(loss((batch["query"] + 5) % 40))


def test_word_dropout_leaves_the_sentence_token_alone_and_no_query_without_text(folders):
    task = SegmentationTask(tiny.config(folders, data__word_dropout=0.25))
    mask = jnp.asarray(task.frozen["bank"]["mask"][:1].repeat(400, 0))
    fewer = np.asarray(task._fewer_words(mask, jax.random.split(jax.random.key(0), 400)))
    whole, alone = (fewer == mask).all(axis=1), fewer.sum(axis=1) == 1
    assert (whole | alone).all() and fewer[:, -1].all()
    assert 0.15 < alone.mean() < 0.35
    never = SegmentationTask(tiny.config(folders))
    assert never._fewer_words(mask, jax.random.split(jax.random.key(0), 400)) is mask


def test_without_a_sentence_token_the_bank_is_one_shorter(folders):
    with_token = SegmentationTask(tiny.config(folders)).frozen["bank"]
    without = SegmentationTask(tiny.config(folders, model__sentence_token=False)).frozen["bank"]
    assert with_token["tokens"].shape[1] == without["tokens"].shape[1] + 1 == 21
    with pytest.raises(UserError, match="word_dropout=0.5 leaves queries without any text"):
        tiny.config(folders, model__sentence_token=False, data__word_dropout=0.5)


def test_text_noise_moves_tokens_by_the_stated_share_of_their_deviation(folders):
    task = SegmentationTask(tiny.config(folders, data__text_noise=0.2))
    tokens = jax.random.normal(jax.random.key(0), (64, 20, 16)) * 3.0
    moved = task._noisy_text(tokens, jax.random.split(jax.random.key(1), 64)) - tokens
    assert float(moved.std()) == pytest.approx(0.6, rel=0.02)
    assert abs(float(moved.mean())) < 0.01
    still = SegmentationTask(tiny.config(folders))
    assert still._noisy_text(tokens, jax.random.split(jax.random.key(1), 64)) is tokens


def test_each_query_of_an_image_draws_its_own_noise_and_no_key_is_used_twice(segmentation):
    _, task = segmentation
    kinds = task._keys(example_keys(0, np.arange(5)), 3)  # of noise, text and words
    keys = jax.random.key_data(kinds.reshape(-1))
    assert len({k.tobytes() for k in np.asarray(keys)}) == 3 * 15


def test_draws_are_a_pure_function_of_seed_and_index(folders):
    config = tiny.config(folders).diffusion
    schedule = schedule_from(config)

    def draw(index, seed=0):
        keys = example_keys(seed, np.asarray(index))
        return draw_noise_and_timestep(keys, (4, 4, 2), config, schedule)

    (noise, t), (again, t2) = draw([7, 8, 9]), draw([9, 7])
    np.testing.assert_array_equal(noise[jnp.array([2, 0])], again)
    np.testing.assert_array_equal(t[jnp.array([2, 0])], t2)
    assert (draw([7], seed=1)[0] != noise[:1]).all()


@pytest.mark.parametrize("noise", ["gaussian", "multires"])
@pytest.mark.parametrize("sampling", ["uniform", "high_noise"])
def test_every_choice_of_draws_gives_unit_noise_and_legal_timesteps(folders, noise, sampling):
    changes = {"diffusion__noise": noise, "diffusion__timestep_sampling": sampling}
    config = tiny.config(folders, **changes).diffusion
    keys = example_keys(0, np.arange(256))
    drawn, t = draw_noise_and_timestep(keys, (8, 8, 4), config, schedule_from(config))
    # per example: coarse noise has a mean of its own, which a deviation over all would count
    assert float(drawn.std(axis=(1, 2, 3)).mean()) == pytest.approx(1.0, abs=0.01)
    assert int(t.min()) >= 0 and int(t.max()) <= 999
    at_the_end = float((t == 999).mean())
    assert at_the_end == pytest.approx(0.5 if sampling == "high_noise" else 0.0, abs=0.1)


def test_multi_resolution_noise_is_plain_at_the_first_timestep_and_coarse_at_the_last(folders):
    """Annealed as 0.9 t / T, so that neighbors correlate the more the noisier the timestep is."""
    changes = {"diffusion__noise": "multires", "diffusion__timestep_sampling": "uniform"}
    config = tiny.config(folders, **changes).diffusion
    keys = example_keys(0, np.arange(512))
    drawn, t = draw_noise_and_timestep(keys, (16, 16, 4), config, schedule_from(config))
    neighbors = np.asarray((drawn[:, 1:] * drawn[:, :-1]).mean(axis=(1, 2, 3)))
    early, middle, late = (neighbors[(t >= a) & (t < a + 100)].mean() for a in (0, 450, 900))
    assert abs(early) < 0.02 and early + 0.05 < middle < late - 0.1


def test_the_scaled_latent_is_the_means_times_the_factor(segmentation):
    _, task = segmentation
    image = to_unit(tiny.batch(1)["image"])
    vae = functional.merge(task.vae.graphdef, task.frozen["vae"])
    np.testing.assert_allclose(
        task.vae.encode(task.frozen["vae"], image), 0.7 * vae.encode(image).mean, atol=1e-6
    )
    latent = jax.random.normal(jax.random.key(0), (1, 8, 8, 4))
    np.testing.assert_allclose(
        task.vae.decode(task.frozen["vae"], latent), vae.decode(latent / 0.7), atol=1e-6
    )


def test_to_unit_maps_0_and_255_to_minus_and_plus_one():
    np.testing.assert_allclose(to_unit(np.array([[0, 255]], np.uint8)), [[-1, 1]])


@pytest.mark.parametrize("codec", ["binary", pytest.param("palette", marks=pytest.mark.slow)])
def test_the_auxiliary_mask_loss_is_added_with_its_weight_and_only_at_high_noise(codec, folders):
    batch, keys = tiny.batch(), example_keys(0, tiny.batch()["index"])

    def loss(**changes):
        task = SegmentationTask(tiny.config(folders, model__codec=codec, **changes))
        task.prepare()
        return jax.jit(lambda p: task.loss(p, task.frozen, batch, keys))(task.initial())

    plain, metrics = loss()
    assert "mask_loss" not in metrics
    both, metrics = loss(loss__mask_weight=0.5)
    assert float(metrics["mse"]) == pytest.approx(float(plain), rel=1e-5)
    assert float(both) == pytest.approx(float(plain) + 0.5 * float(metrics["mask_loss"]), rel=1e-5)
    _, never = loss(loss__mask_weight=0.5, loss__mask_from=1.0)
    assert float(metrics["mask_loss"]) > 0 and float(never["mask_loss"]) == 0


@pytest.mark.parametrize(("prediction_type", "zero_snr"), [("v_prediction", True), ("epsilon", False)])
def test_the_error_of_the_clean_latent_is_added_with_its_weight(
    prediction_type, zero_snr, folders, monkeypatch
):
    batch, keys = tiny.batch(), example_keys(0, tiny.batch()["index"])
    batch["label"][:, :8, :8] = -1  # not judged

    seen = []
    solve = Schedule.x0_and_eps

    def spy(self, prediction, x, t):
        seen[:] = prediction, x, t
        return solve(self, prediction, x, t)

    monkeypatch.setattr(Schedule, "x0_and_eps", spy)

    def loss(weight):
        kind = {"diffusion__prediction_type": prediction_type, "diffusion__zero_snr": zero_snr}
        task = SegmentationTask(tiny.config(folders, loss__x0_weight=weight, **kind))
        task.prepare()

        def traced(params):
            seen.clear()
            return *task.loss(params, task.frozen, batch, keys), list(seen)

        size = len(str(jax.make_jaxpr(traced)(task.initial())).splitlines())
        return task, size, *jax.jit(traced)(task.initial())

    _, size, plain, metrics, solved = loss(0.0)
    assert "x0_loss" not in metrics and not solved
    task, larger, both, metrics, solved = loss(2.0)
    assert size < larger, "a weight of zero costs nothing"
    assert float(both) == pytest.approx(float(plain) + 2.0 * float(metrics["x0_loss"]), rel=1e-5)
    assert float(metrics["mse"]) == pytest.approx(float(plain), rel=1e-5)

    # by hand: x0 of the stated pair, over the cells that carry a label
    prediction, noisy, t = (np.asarray(x, np.float64) for x in solved)
    abar = np.asarray(task.schedule.alphas_cumprod)[t.astype(int)][:, None, None, None]
    if prediction_type == "epsilon":
        clean = (noisy - np.sqrt(1 - abar) * prediction) / np.sqrt(abar)
    else:
        clean = np.sqrt(abar) * noisy - np.sqrt(1 - abar) * prediction
    _, x0 = task._latents(task.frozen, batch, None)
    x0 = np.asarray(x0).reshape(clean.shape)
    valid = np.asarray(latent_validity(batch["label"], task.vae.config.factor)).repeat(2, axis=0)
    expected = np.abs(clean - x0).mean(axis=-1)[valid].mean()
    assert float(metrics["x0_loss"]) == pytest.approx(expected, rel=1e-3)


def test_the_color_error_sees_cell_means_and_not_texture():
    texture = np.tile(np.array([[1.0, -1.0], [-1.0, 1.0]]), (4, 4))[None, :, :, None].repeat(3, -1)
    assert float(color_error(jnp.asarray(texture), 4)) == pytest.approx(0, abs=1e-6)
    redder = np.zeros((1, 8, 8, 3))
    redder[..., 0] = 0.3
    # red - green is off by 0.3, green - blue by nothing, brightness by 0.1
    assert float(color_error(jnp.asarray(redder), 4)) == pytest.approx(0.4 / 3, rel=1e-5)


def test_the_autoencoders_mask_scores():
    mask = np.where(np.arange(8) < 4, 1.0, -1.0)[None, None, :, None] * np.ones((1, 4, 1, 3))
    assert float(binary_iou(mask, mask)) == 1.0
    assert float(binary_iou(-mask, mask)) == 0.0
    assert float(binary_iou(np.ones_like(mask), mask)) == 0.5
    assert float(mask_error(mask, mask)) < 0.05 < 1.0 < float(mask_error(-mask, mask))


@pytest.mark.parametrize("size", [30, 36, 260])
def test_an_image_size_that_the_models_cannot_halve_is_refused(folders, size):
    with pytest.raises(UserError, match=f"config.data.image_size={size}.*multiple"):
        SegmentationTask(tiny.config(folders, data__image_size=size))


@pytest.mark.parametrize("size", [(20,), (64, 36)])
def test_views_that_cannot_be_halved_are_refused_before_the_training(folders, size):
    config = tiny.config(folders, eval__view_size=size)
    told = re.escape(f"config.eval.view_size={size}: must be a multiple of")
    with pytest.raises(UserError, match=told) as caught:
        SegmentationTask(config)
    tiny.one_line(caught.value)
    with pytest.raises(UserError, match=told):
        SegmentationTask(config, tiny.shapes_of(config))  # of --mode=compile


def test_tokens_that_do_not_fit_the_cross_attention_need_adapters(folders):
    with pytest.raises(UserError, match="config.model.text_adapters") as caught:
        SegmentationTask(tiny.config(folders, model__text_adapters=False))
    assert "16" in tiny.one_line(caught.value) and "8" in str(caught.value)


def test_missing_weights_are_one_clear_error(folders, tmp_path):
    for key in ("vae", "unet", "text"):
        with pytest.raises(UserError) as caught:
            SegmentationTask(tiny.config(folders, **{f"model__{key}": str(tmp_path / "nowhere")}))
        assert "nowhere" in tiny.one_line(caught.value)


def test_weights_of_another_kind_are_refused(folders):
    with pytest.raises(UserError, match="AutoencoderKL"):
        SegmentationTask(tiny.config(folders, model__vae=folders["unet"]))


def test_the_real_text_tower_feeds_the_unet(folders):
    try:
        packages.minilm_folder()
    except UserError as error:
        pytest.skip(str(error))
    task = tiny.load_task(tiny.config(folders, model__text="minilm"), prompts=("water", "forest"))
    assert task.frozen["bank"]["tokens"].shape == (2, 21, 384)  # 20 words, the sentence
    batch = tiny.batch(2)
    batch["query"] %= 2
    keys = example_keys(0, batch["index"])
    loss, _ = jax.jit(lambda b: task.loss(task.initial(), task.frozen, b, keys))(batch)
    assert np.isfinite(float(loss))
