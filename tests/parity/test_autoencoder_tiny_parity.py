# SPDX-License-Identifier: Apache-2.0
"""AutoencoderTiny against torch diffusers: live where torch is installed, else stored outputs."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from oracle import (
    GOLDEN,
    TINY_VAE,
    fill_torch,
    nhwc,
    relative_l2,
    run,
    seeded_component,
    seeded_input,
)

from digseg_jax.weights import load_component, save_component

LIMIT, LIMIT_BF16 = 1e-5, 2e-2  # relative L2


def test_seeded_weights_give_the_stored_outputs(tmp_path):
    golden = np.load(GOLDEN / "autoencoder_tiny_small.npz")
    model = seeded_component(TINY_VAE, tmp_path)
    latent = run(model, "encode", nhwc(seeded_input("image", (2, 3, 16, 24)))).mean
    image = run(model, "decode", nhwc(seeded_input("latent", (2, 4, 4, 6))))
    assert relative_l2(latent, golden["latent"]) <= LIMIT
    assert relative_l2(image, golden["image"]) <= LIMIT


def torch_model(folder, **config):
    pytest.importorskip("torch")
    from diffusers import AutoencoderTiny

    model = AutoencoderTiny.from_config(config) if config else AutoencoderTiny()
    fill_torch(model)
    model.save_pretrained(folder)
    return model


def compare(theirs, folder, size: tuple[int, int], limit: float = LIMIT, **options) -> None:
    import torch

    ours = load_component(folder, **options)
    factor = ours.config.factor
    image = seeded_input("live image", (1, 3, *size))
    latent = seeded_input("live latent", (1, 4, size[0] // factor, size[1] // factor))
    with torch.no_grad():
        encoded = theirs.encode(torch.from_numpy(image)).latents
        decoded = theirs.decode(torch.from_numpy(latent)).sample
    assert relative_l2(run(ours, "encode", nhwc(image)).mean, nhwc(encoded)) <= limit
    assert relative_l2(run(ours, "decode", nhwc(latent)), nhwc(decoded)) <= limit


@pytest.mark.parametrize("size", [(16, 16), (20, 12)])
def test_encode_and_decode(tmp_path, size):
    compare(torch_model(tmp_path, **TINY_VAE), tmp_path, size)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(512, 512), (384, 640)])
def test_full_size(tmp_path, size):
    theirs = torch_model(tmp_path)
    compare(theirs, tmp_path, size)
    compare(theirs, tmp_path, size, LIMIT_BF16, dtype=jnp.bfloat16)


def test_round_trip_through_our_files_is_bit_identical(tmp_path):
    theirs = torch_model(tmp_path / "torch", **TINY_VAE)
    import torch
    from diffusers import AutoencoderTiny

    save_component(load_component(tmp_path / "torch"), tmp_path / "ours")
    again, info = AutoencoderTiny.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    expected, got = theirs.state_dict(), again.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    latent = torch.from_numpy(seeded_input("latent", (1, 4, 4, 6)))
    assert torch.equal(again.decode(latent).sample, theirs.decode(latent).sample)
