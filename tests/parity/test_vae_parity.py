# SPDX-License-Identifier: Apache-2.0
"""AutoencoderKL against torch diffusers: live where torch is installed, else stored outputs."""

from __future__ import annotations

import numpy as np
import pytest
from oracle import (
    GOLDEN,
    VAE,
    fill_torch,
    nhwc,
    relative_l2,
    run,
    seeded_component,
    seeded_input,
)
from safetensors.numpy import load_file, save_file

from digseg_jax import trees
from digseg_jax.models import functional
from digseg_jax.weights import load_component, save_component

LIMIT = 1e-5  # relative L2
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def test_seeded_weights_give_the_stored_outputs(tmp_path):
    golden = np.load(GOLDEN / "vae_small.npz")
    model = seeded_component(VAE, tmp_path)
    posterior = run(model, "encode", nhwc(seeded_input("image", (2, 3, 16, 24))))
    image = run(model, "decode", nhwc(seeded_input("latent", (2, 4, 4, 6))))
    assert relative_l2(posterior.mean, golden["mean"]) <= LIMIT
    assert relative_l2(posterior.logvar, golden["logvar"]) <= LIMIT
    assert relative_l2(image, golden["image"]) <= LIMIT


@pytest.fixture
def torch_vae(tmp_path):
    pytest.importorskip("torch")
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_config(VAE)
    fill_torch(model)
    model.save_pretrained(tmp_path / "torch")
    return model, tmp_path / "torch"


@pytest.mark.parametrize("size", [(16, 16), (20, 12)])
def test_encode_and_decode(torch_vae, size):
    import torch

    theirs, folder = torch_vae
    ours = load_component(folder)
    image = seeded_input("live image", (1, 3, *size))
    latent = seeded_input("live latent", (1, 4, size[0] // 4, size[1] // 4))
    with torch.no_grad():
        posterior = theirs.encode(torch.from_numpy(image)).latent_dist
        decoded = theirs.decode(torch.from_numpy(latent)).sample
    got = run(ours, "encode", nhwc(image))
    assert relative_l2(got.mean, nhwc(posterior.mean)) <= LIMIT
    assert relative_l2(got.logvar, nhwc(posterior.logvar)) <= LIMIT
    assert relative_l2(run(ours, "decode", nhwc(latent)), nhwc(decoded)) <= LIMIT


def test_round_trip_through_our_files_is_bit_identical(torch_vae, tmp_path):
    import torch
    from diffusers import AutoencoderKL

    theirs, folder = torch_vae
    save_component(load_component(folder), tmp_path / "ours")
    again, info = AutoencoderKL.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    expected, got = theirs.state_dict(), again.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    assert again.config.scaling_factor == theirs.config.scaling_factor
    assert list(again.config.block_out_channels) == list(theirs.config.block_out_channels)


@pytest.mark.parametrize("as_convolution", [False, True])
def test_old_attention_keys_load_to_the_same_parameters(tmp_path, as_convolution):
    new = seeded_component(VAE, tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {}
    for key, value in load_file(file).items():
        for current, former in OLD_ATTENTION.items():
            if f".{current}." in key:
                key = key.replace(f".{current}.", f".{former}.")
                conv = as_convolution and value.ndim == 2
                value = value[..., None, None] if conv else value
        old[key] = value
    assert sum("proj_attn" in key for key in old) == 4
    save_file(old, file)
    expected, got = (trees.flatten(functional.split(m)[1]) for m in (new, load_component(tmp_path)))
    assert expected.keys() == got.keys()
    assert all(np.array_equal(expected[path], got[path]) for path in expected)
