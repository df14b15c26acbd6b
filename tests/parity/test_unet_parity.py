# SPDX-License-Identifier: Apache-2.0
"""The U-Net against torch diffusers: live where torch is installed, else stored outputs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracle import (
    GOLDEN,
    UNETS,
    fill_torch,
    nhwc,
    relative_l2,
    run,
    seeded_component,
    torch_unet_output,
    unet_inputs,
)

from digseg_jax import trees
from digseg_jax.errors import UserError
from digseg_jax.models import functional
from digseg_jax.models.unet import UNet2DConditionModel, UNetConfig
from digseg_jax.weights import (
    load_component,
    load_unet_params,
    narrow_conv_in,
    save_component,
    widen_conv_in,
)

LIMIT = 1e-5  # relative L2
styles = pytest.mark.parametrize("style", list(UNETS))


def ours_output(model, sample, timestep, text, mask=None) -> np.ndarray:
    return run(model, "__call__", nhwc(sample), jnp.asarray(timestep), text, mask)


@styles
def test_seeded_weights_give_the_stored_output(tmp_path, style):
    golden = np.load(GOLDEN / "unet_small.npz")
    model = seeded_component(UNETS[style], tmp_path)
    assert relative_l2(ours_output(model, *unet_inputs()), golden[style]) <= LIMIT


@pytest.fixture
def torch_unet(tmp_path, style):
    pytest.importorskip("torch")
    import diffusers

    model = diffusers.UNet2DConditionModel.from_config(UNETS[style])
    fill_torch(model)
    model.save_pretrained(tmp_path / "torch")
    return model, tmp_path / "torch"


@styles
def test_with_and_without_text_mask(torch_unet, style):
    theirs, folder = torch_unet
    ours = load_component(folder)
    sample, timestep, text, mask = unet_inputs((16, 8))
    unmasked = ours_output(ours, sample, timestep, text)
    masked = ours_output(ours, sample, timestep, text, mask)
    assert relative_l2(unmasked, nhwc(torch_unet_output(theirs, sample, timestep, text))) <= LIMIT
    expected = nhwc(torch_unet_output(theirs, sample, timestep, text, mask))
    assert relative_l2(masked, expected) <= LIMIT
    assert relative_l2(masked, unmasked) > 1e-3


@styles
def test_round_trip_through_our_files_is_bit_identical(torch_unet, tmp_path, style):
    import diffusers
    import torch

    theirs, folder = torch_unet
    save_component(load_component(folder), tmp_path / "ours")
    again, info = diffusers.UNet2DConditionModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values())
    expected, got = theirs.state_dict(), again.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    inputs = unet_inputs()
    assert relative_l2(torch_unet_output(again, *inputs), torch_unet_output(theirs, *inputs)) == 0


@pytest.fixture(scope="module")
def seeded(tmp_path_factory) -> tuple[nnx.Module, Path]:
    folder = tmp_path_factory.mktemp("prior")
    return seeded_component(UNETS["sd1"], folder), folder


@pytest.fixture
def prior(seeded, tmp_path) -> tuple[nnx.Module, Path]:
    model, folder = seeded
    return model, Path(shutil.copytree(folder, tmp_path / "prior"))


def abstract(config: UNetConfig):
    rngs = functional.FixedRngs()
    return functional.abstract(lambda: UNet2DConditionModel(config, rngs=rngs))


def test_widened_model_on_doubled_input_equals_the_checkpoint(prior):
    model, folder = prior
    config = dataclasses.replace(model.config, in_channels=8)
    wide = functional.merge(abstract(config)[0], load_unet_params(folder, config))
    sample, timestep, text, mask = unet_inputs()
    doubled = np.concatenate([sample, sample], axis=1)
    expected = ours_output(model, sample, timestep, text, mask)
    assert relative_l2(ours_output(wide, doubled, timestep, text, mask), expected) <= LIMIT


def test_equal_channels_load_as_they_are_and_narrowing_undoes_widening(prior, tmp_path):
    model, folder = prior
    same = load_unet_params(folder, model.config)
    expected = trees.flatten(functional.split(model)[1])
    wide_config = dataclasses.replace(model.config, in_channels=8)
    wide = load_unet_params(folder, wide_config)
    save_component((wide_config, wide), tmp_path / "wide")
    again = load_unet_params(tmp_path / "wide", wide_config)
    for got in (same, narrow_conv_in(wide), narrow_conv_in(again)):
        flat = trees.flatten(got)
        assert flat.keys() == expected.keys()
        assert all(np.array_equal(flat[path], expected[path]) for path in flat)
    assert (widen_conv_in(same)["conv_in"]["kernel"] == wide["conv_in"]["kernel"]).all()


@pytest.mark.parametrize("channels", [5, 9, 16])
def test_other_numbers_of_channels_are_refused(prior, channels):
    model, folder = prior
    config = dataclasses.replace(model.config, in_channels=channels)
    with pytest.raises(UserError, match=f"in_channels={channels}; legal: 4, or 8 by widening"):
        load_unet_params(folder, config)


def test_a_checkpoint_without_the_models_adapters_is_refused(prior):
    model, folder = prior
    config = dataclasses.replace(model.config, in_channels=8, text_adapters=True)
    with pytest.raises(UserError, match=r"missing: text_adapters"):
        load_unet_params(folder, config)


@pytest.mark.parametrize(("field", "value"), [("attention_head_dim", 2), ("norm_num_groups", 4)])
def test_what_the_shapes_do_not_show_is_compared_by_config(prior, field, value):
    model, folder = prior
    config = dataclasses.replace(model.config, in_channels=8, **{field: value})
    with pytest.raises(UserError, match=r"config.json: (heads|norm_num_groups)="):
        load_unet_params(folder, config)


def test_heads_as_one_number_or_as_a_list_are_the_same(prior):
    model, folder = prior
    assert isinstance(model.config, UNetConfig)
    values = json.loads((folder / "config.json").read_text()) | {"attention_head_dim": [4, 4, 4]}
    (folder / "config.json").write_text(json.dumps(values))
    load_unet_params(folder, model.config)
