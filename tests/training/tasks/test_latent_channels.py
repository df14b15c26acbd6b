# SPDX-License-Identifier: Apache-2.0
"""U-Net and autoencoder must have the same latents, however the U-Net starts."""

from __future__ import annotations

import dataclasses

import pytest
import tiny

from digseg_jax.errors import UserError
from digseg_jax.models.vae import AutoencoderKL
from digseg_jax.training.setup import TASKS
from digseg_jax.training.tasks.segmentation import SegmentationTask
from digseg_jax.weights import save_component


@pytest.fixture(scope="module")
def six(tmp_path_factory) -> str:
    """An autoencoder whose latents have six channels."""
    folder = tmp_path_factory.mktemp("six")
    config = dataclasses.replace(tiny.VAE, latent_channels=6)
    save_component((config, tiny.random_params(AutoencoderKL, config, 1)), folder)
    return str(folder)


@pytest.mark.parametrize("start", ["random", "pretrained"])
def test_a_unet_of_other_latents_is_told_by_both_keys(folders, six, start):
    with pytest.raises(UserError) as caught:
        SegmentationTask(tiny.config(folders, model__vae=six, model__unet_init=start))
    message = tiny.one_line(caught.value)
    assert f"config.model.unet={folders['unet']!r} predicts latents of 4 channels" in message
    assert f"config.model.vae={six!r} have 6" in message


def test_a_prior_has_the_latents_of_its_autoencoder(folders, six):
    task = TASKS["prior"](tiny.config(folders, task="prior", model__vae=six))
    assert (task.unet_config.in_channels, task.unet_config.out_channels) == (6, 6)
    assert task.abstract["conv_in"]["kernel"].shape[2] == 6
