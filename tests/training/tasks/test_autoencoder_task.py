# SPDX-License-Identifier: Apache-2.0
"""The autoencoder's task: crops that fit its levels, and the attention that the configuration names."""

from __future__ import annotations

import dataclasses

import pytest
import tiny

from digseg_jax.config.schema import ComputeConfig, VaeArch
from digseg_jax.errors import UserError
from digseg_jax.models import functional
from digseg_jax.models.partition import LocalAttention
from digseg_jax.training.tasks.autoencoder import AutoencoderTask

ARCH = VaeArch(block_out_channels=(4, 4, 8), norm_num_groups=2, mid_block_add_attention=True)


def made(arch: VaeArch = ARCH, compute: ComputeConfig | None = None, size: int = 32) -> AutoencoderTask:
    return AutoencoderTask(arch, compute or ComputeConfig(), dtype="float32", size=size, seed=0)


def test_a_size_that_the_levels_cannot_halve_is_told_at_the_start():
    with pytest.raises(UserError) as caught:
        made(size=30)
    message = tiny.one_line(caught.value)
    assert "config.data.image_size=30: must be a multiple of 4 pixels" in message


def test_an_architecture_without_levels_is_told():
    with pytest.raises(UserError, match="block_out_channels=()"):
        made(dataclasses.replace(ARCH, block_out_channels=()))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("plain", "plain"), ("auto", "chunked"), ("splash", LocalAttention("splash"))],
)
def test_its_attention_is_the_configured_one(name, expected):
    task = made(compute=ComputeConfig(attention=name))
    vae = functional.merge(task.graphdef, task.initial())
    assert vae.encoder.mid_block.attentions[0].compute.attention == expected
