# SPDX-License-Identifier: Apache-2.0
"""Step 0 of the U-Net: a parallel text pathway changes nothing yet; misfits are refused."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import hub
import jax
import numpy as np
import pytest
import tiny
from hub import layouts
from same import assert_same_bits

from digseg_jax import trees
from digseg_jax.config.parse import parse
from digseg_jax.config.schema import Config
from digseg_jax.errors import UserError
from digseg_jax.models import functional
from digseg_jax.models.text_branch import ADAPTERS, BRANCH
from digseg_jax.models.unet import UNet2DConditionModel
from digseg_jax.recipes import stable_diffusion
from digseg_jax.runtime import sharding
from digseg_jax.runtime.sharding import infer_shardings, place, place_batch
from digseg_jax.training.optim import make_optimizer
from digseg_jax.training.step import initial_state
from digseg_jax.training.tasks.segmentation import SegmentationTask
from digseg_jax.training.tasks.unet_start import encode_empty, native_text
from digseg_jax.weights import catalog, load_config, load_text_tower, load_unet_params

PIPELINES = {"sd15": "sd-1.5", "sd21": "sd-2.1"}


def pipeline(repositories: Path, version: str, text: str = "", **changes) -> Config:
    """A recipe on the miniature repositories, with a parallel pathway."""
    values = stable_diffusion(version, "camvid")
    for name, folder in hub.pipeline_folders(repositories, PIPELINES[version]).items():
        values.model[name] = folder
    values.model.update(dtype="float32", text_injection="parallel", text=text or values.model.text)
    values.compute.update(attention="plain", remat="none")
    values.data.update(image_size=64)
    for key, value in changes.items():
        section, name = key.split("__")
        values[section][name] = value
    return parse(values)


def inputs(task: SegmentationTask, n: int = 2) -> tuple[np.ndarray, ...]:
    """Made-up latents, timesteps, and the tokens and masks of the first queries."""
    image, x = np.random.default_rng(0).standard_normal((2, n, 8, 8, 4), np.float32)
    bank = task.frozen["bank"]
    return image, x, np.array([3, 999])[:n], bank["tokens"][:n], bank["mask"][:n]


def pretrained(config: Config, task: SegmentationTask) -> np.ndarray:
    """The widened pretrained U-Net's output for the same latents and its own empty prompt."""
    unet = dataclasses.replace(load_config(config.model.unet), in_channels=8)
    graphdef, _ = functional.abstract(lambda: UNet2DConditionModel(unet, rngs=functional.FixedRngs()))
    params = load_unet_params(config.model.unet, unet)
    tokens = encode_empty(load_text_tower(native_text(config.model)), config.model)
    image, x, t, *_ = inputs(task)

    def predict(params, x, t, tokens):
        return functional.merge(graphdef, params)(x, t, tokens)

    return np.asarray(
        jax.jit(predict)(params, np.concatenate([image, x], axis=-1), t, np.stack([tokens] * len(x)))
    )


@pytest.mark.parametrize("version", PIPELINES)
def test_a_parallel_pathway_starts_as_the_pretrained_unet_to_the_last_bit(repositories, version):
    config = pipeline(repositories, version)
    task = SegmentationTask(config)
    params, predict = task.initial(), jax.jit(task.predict_latent)
    assert task.unet_config.prompt_length == 77
    expected = pretrained(config, task)
    np.testing.assert_array_equal(predict(params, *inputs(task)), expected)

    # One update of the second attention's output is enough for the text to be heard.
    flat = trees.flatten(params)
    outs = [path for path in flat if path.endswith(".attn2.text.to_out.0.kernel")]
    assert len(outs) == 16  # every transformer of a Stable Diffusion
    flat |= {path: flat[path] + 0.1 for path in outs}
    assert np.abs(predict(trees.unflatten(flat), *inputs(task)) - expected).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "adapters"), [("clip-b16", True), ("biomedclip", True), ("minilm", False)]
)
def test_any_tower_starts_with_the_pipelines_own_empty_prompt(repositories, tmp_path, name, adapters):
    """The pipelines' own encoders are those of the test above."""
    text = str(repositories / catalog.hub_id(name) / "main") if name == "clip-b16" else name
    if name == "biomedclip":
        text = str(hub.biomedclip_folder(tmp_path / name))
    config = pipeline(repositories, "sd15", text, model__text_adapters=adapters)
    task = tiny.load_task(config, prompts=("road", "sky"))
    params = trees.flatten(task.initial())
    assert {path: x.shape for path, x in params.items()} == {
        path: x.shape for path, x in trees.flatten(task.abstract).items()
    }
    assert tiny.shapes_of(config).unet == task.unet_config

    # The text's keys take the tower's tokens, or the adapters'; the prompt is Stable Diffusion's own.
    text_key = params["mid_block.attentions.0.transformer_blocks.0.attn2.text.to_k.kernel"]
    assert len(text_key) == (layouts.TEXT_WIDTH if adapters else task.parts.tower.width)
    own = encode_empty(load_text_tower(native_text(config.model)), config.model)
    prompts = [x for path, x in params.items() if path.endswith("attn2.prompt.embedding")]
    assert len(prompts) == 16 and all(np.array_equal(x, own) for x in prompts)


@pytest.fixture
def small(folders):
    """A tiny configuration whose tower's tokens are wider than the U-Net's own."""

    def make(**changes) -> Config:
        options = {"model__text_injection": "parallel", "model__unet_text": tiny.narrow_text(folders)}
        return tiny.config(folders, **options | changes)

    return make


def test_what_is_new_is_what_the_checkpoint_lacks(small, folders, tmp_path):
    task = SegmentationTask(small())
    fresh = {path for path in trees.flatten(task.abstract) if any(re.search(p, path) for p in task.new)}
    assert {path for path in fresh if "attn2" not in path} == {
        path for path in trees.flatten(task.abstract) if path.startswith("text_adapters.")
    }
    kinds = {path.split(".attn2.")[1].split(".")[0] for path in fresh if "attn2" in path}
    assert kinds == {"text", "scale"}

    # Nothing is new to weights that have been trained with the pathway.
    task.export(task.initial(), tmp_path, {})
    unet, own = str(tmp_path / "unet"), {"model__unet_text": ""}
    again = SegmentationTask(small(model__unet=unet, **own))
    assert again.new == () and again.unet_config == task.unet_config
    with pytest.raises(UserError, match="text_injection='adapter': .* reads its text in parallel"):
        SegmentationTask(small(model__unet=unet, model__text_injection="adapter", **own))

    # Random weights are all equally new; so are adapters for tokens of another width.
    assert SegmentationTask(small(model__unet_init="random")).new == ()
    narrow = tiny.narrow_text(folders)
    other = SegmentationTask(small(model__unet=unet, model__text=narrow, **own))
    assert other.new == (ADAPTERS,)
    assert trees.flatten(other.initial()).keys() == trees.flatten(other.abstract).keys()


def test_a_prompt_of_another_width_is_refused_with_the_key_that_names_the_right_encoder(small):
    with pytest.raises(UserError, match="name the text encoder of .* config.model.unet_text") as caught:
        SegmentationTask(small(model__unet_text=""))
    assert "8 wide" in tiny.one_line(caught.value) and "are 16" in str(caught.value)


def test_a_checkpoints_own_adapters_adapt_its_prompt(folders, small, tmp_path):
    """A prior that was trained with adapters: with its empty caption it starts as it was."""
    prior = SegmentationTask(tiny.config(folders))
    prior.export(tiny.without_zeros(prior.initial()), tmp_path, {})
    config = small(model__unet=str(tmp_path / "unet"), model__unet_text="")
    task = SegmentationTask(config)
    assert (task.unet_config.prompt_length, task.new) == (3, (BRANCH,))  # begin, end, sentence

    image, x, t, *_ = arguments = inputs(task)
    empty = np.stack([encode_empty(task.parts.tower, config.model)] * len(x))
    every = np.ones(empty.shape[:2], bool)
    trained, now = jax.jit(prior.predict_latent), jax.jit(task.predict_latent)
    pretrained = trained(tiny.without_zeros(prior.initial()), image, x, t, empty, every)
    start = task.initial()
    np.testing.assert_allclose(now(start, *arguments), pretrained, atol=1e-6)
    assert np.abs(now(tiny.without_zeros(start), *arguments) - pretrained).max() > 1e-3


@pytest.mark.slow  # a block alone, on these devices: tests/models/test_text_branch.py
def test_four_devices_train_as_one_does(small, monkeypatch):
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 64)  # else nothing this small is split
    config = small(optim__new_lr_scale=10.0)
    task = SegmentationTask(config)
    ends = []
    for axes in ({}, {"data": 1, "fsdp": 2, "tensor": 2}):
        mesh = tiny.mesh(**axes)
        optimizer = make_optimizer(config.optim, config.train.steps, task.new)
        state = initial_state(task.initial(), optimizer, config.optim)
        shardings, frozen = infer_shardings(state, mesh), infer_shardings(task.frozen, mesh)
        step = tiny.train_step(task, config, mesh, (shardings, frozen))
        state, arrays = place(state, shardings), place(task.frozen, frozen)
        losses = []
        for i in range(3):
            state, metrics = step(state, arrays, place_batch(tiny.batch(seed=i), mesh))
            losses.append(float(metrics["loss"]))
        ends.append(losses)
    np.testing.assert_allclose(ends[1], ends[0], rtol=1e-5, atol=1e-5)
    specs = {path: str(x.sharding.spec) for path, x in trees.flatten(state["params"]).items()}
    split = {
        path.split(".attn2.text.")[1]
        for path, s in specs.items()
        if ".attn2.text." in path and "tensor" in s
    }
    assert split == {"to_q.kernel", "to_k.kernel", "to_v.kernel", "to_out.0.kernel"}


@pytest.mark.slow
@pytest.mark.usefixtures("cover")
def test_a_run_that_stopped_ends_with_the_same_bits(small, tmp_path):
    class Stopped(Exception):
        """Stands in for whatever ends a process."""

    def stop(step, _):
        if step == 3:
            raise Stopped
        return {}

    def run(folder, on_eval=None, **changes):
        config = small(optim__new_lr_scale=10.0, train__steps=4, **changes)
        return tiny.trainer(config, SegmentationTask(config), tiny.mesh(), folder).run(on_eval)

    with pytest.raises(Stopped):
        run(tmp_path / "stopped", stop, logging__eval_every=1)
    whole = run(tmp_path / "whole")
    assert_same_bits(run(tmp_path / "stopped"), jax.device_get(whole))
    moves = trees.flatten(whole["params"])
    assert all(np.any(x) for path, x in moves.items() if path.endswith("attn2.text.to_out.0.kernel"))
