# SPDX-License-Identifier: Apache-2.0
"""Frozen parts are on the devices once, split like the state: the first device holds no more."""

from __future__ import annotations

import dataclasses
import gc

import jax
import numpy as np
import pytest
import tiny

from digseg_jax import jobs
from digseg_jax.models.unet import DOWN_TYPES, UP_TYPES, UNet2DConditionModel, UNetConfig
from digseg_jax.models.vae import AutoencoderKL, VaeConfig
from digseg_jax.training.tasks.latents import FrozenParts, LatentEncoder
from digseg_jax.training.tasks.segmentation import SegmentationTask
from digseg_jax.weights import save_component

DEVICES = 8
LEVELS = (32, 64, 128, 128)
# Stable Diffusion's levels and attention places, with a tenth of its channels and one layer a level
UNET = UNetConfig(
    sample_size=8,
    block_out_channels=LEVELS,
    down_block_types=(*[DOWN_TYPES[0]] * 3, DOWN_TYPES[1]),
    up_block_types=(UP_TYPES[1], *[UP_TYPES[0]] * 3),
    layers_per_block=1,
    norm_num_groups=8,
    attention_head_dim=8,
    cross_attention_dim=32,
)
VAE = VaeConfig(block_out_channels=LEVELS, layers_per_block=1, norm_num_groups=8, sample_size=64)


@pytest.fixture(scope="module")
def config(folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("structure")
    for name, kind, own in (("unet", UNet2DConditionModel, UNET), ("vae", AutoencoderKL, VAE)):
        save_component((own, tiny.random_params(kind, own, 1)), folder / name)
    parts = folders | {"unet": str(folder / "unet"), "vae": str(folder / "vae")}
    return tiny.config(parts, data__image_size=64, mesh__fsdp=DEVICES, train__batch_size=DEVICES)


def held() -> np.ndarray:
    """Bytes of all buffers on each device; a shard looked at is an array of its own, not a buffer."""
    gc.collect()
    buffers = {
        (shard.device, shard.data.unsafe_buffer_pointer()): shard.data.nbytes
        for array in jax.live_arrays()
        for shard in array.addressable_shards
    }
    return np.array([sum(n for (d, _), n in buffers.items() if d == x) for x in jax.devices()])


def assert_even(before: np.ndarray, least: float) -> None:
    """Of the bytes that came since `before`; least: what each device must have got."""
    more = held() - before
    assert more.min() > least
    assert more.max() < 1.2 * more.min(), more


def test_a_trainers_devices_hold_the_same(config, tmp_path):
    before = held()
    task = SegmentationTask(config)
    trainer = tiny.trainer(config, task, tiny.mesh(1, DEVICES), tmp_path)
    params, _ = trainer._initial_params()
    weights = sum(x.nbytes for x in jax.tree.leaves((task.frozen, params)))
    assert_even(before, weights / DEVICES)
    assert len(task.prompts) == len(task.frozen["bank"]["tokens"])


def test_so_do_those_of_a_latent_cache(config):
    before = held()
    task = FrozenParts(config.data, config.model, config.compute)
    encoder = LatentEncoder(task, tiny.mesh(1, DEVICES), rows=DEVICES)
    images = np.zeros((3, 64, 64, 3), np.uint8)
    assert encoder.images(images).shape == (3, 8, 8, 4)
    assert_even(before, sum(x.nbytes for x in jax.tree.leaves(task.frozen)) / DEVICES)


def test_the_final_evaluation_finds_only_the_weights_on_the_devices(
    cover, config, tmp_path, monkeypatch
):
    """No moments, and no frozen parts beside those that the segmenter places for itself."""
    found = []

    def look(data, settings, seed, task, params, mesh, workdir):
        found.append((held() - before, tiny.bytes_on_a_device(params)))

    monkeypatch.setattr(jobs, "evaluate_and_report", look)
    before = held()
    # The state of step 0 has all that a later one has.
    jobs.train(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=0)), tmp_path)
    more, weights = found[0]
    assert weights <= more.max() < 1.1 * weights
