# SPDX-License-Identifier: Apache-2.0
"""Where arrays live: the mesh and the rule table."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from digseg_jax import sharding
from digseg_jax.config import MeshConfig, OptimConfig
from digseg_jax.errors import UserError
from digseg_jax.optim import make_optimizer
from digseg_jax.sharding import infer_shardings, make_mesh, place, place_batch, spec_of

QUERY = ".mid_block.attentions.0.transformer_blocks.0.attn2.to_q.kernel"
OUT = ".mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.kernel"
UP = ".mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.kernel"
DOWN = ".mid_block.attentions.0.transformer_blocks.0.ff.net.2.kernel"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(fsdp=4), (2, 4, 1)),
        (MeshConfig(data=1, fsdp=-1), (1, 8, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (2, 2, 2)),
        (MeshConfig(data=2, fsdp=1, tensor=-1), (2, 1, 4)),
    ],
)
def test_the_axes_multiply_to_the_devices(config, expected):
    mesh = make_mesh(config)
    assert tuple(mesh.shape[a] for a in ("data", "fsdp", "tensor")) == expected
    assert mesh.size == 8


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(data=3),
        MeshConfig(data=4),
        MeshConfig(data=-1, fsdp=3),
        MeshConfig(data=-1, fsdp=-1),
        MeshConfig(data=0),
        MeshConfig(data=-1, fsdp=0),
        MeshConfig(data=-2, fsdp=-4),
        MeshConfig(data=16),
    ],
    ids=str,
)
def test_axes_that_do_not_fit_are_refused_with_the_number_of_devices(config):
    with pytest.raises(UserError) as caught:
        make_mesh(config)
    message = tiny.one_line(caught.value)
    assert f"data={config.data} fsdp={config.fsdp}" in message and "8 devices" in message


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        (QUERY, (64, 64), P(None, "tensor")),
        (QUERY.replace("to_q", "to_k"), (64, 64), P(None, "tensor")),
        (OUT, (64, 64), P("tensor", None)),
        (UP, (64, 512), P(None, "tensor")),
        (DOWN, (256, 64), P("tensor", None)),
        (QUERY, (64, 63), P(None, None)),  # does not divide
        (".conv_in.kernel", (3, 3, 8, 64), P(None, None, None, None)),
        (UP.replace("kernel", "bias"), (512,), P(None)),
        (".proj_in.kernel", (64, 64), P(None, None)),
    ],
)
def test_the_tensor_axis_splits_attention_and_feed_forward(path, shape, expected):
    assert spec_of(path, shape, tiny.mesh(tensor=2)) == expected


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((3, 3, 128, 256), P(None, None, None, "fsdp")),
        ((3, 3, 256, 128), P(None, None, "fsdp", None)),
        ((512, 130), P("fsdp", None)),
        ((2**16 + 1,), P(None)),  # prime: no dimension divides
        ((8, 64), P(None, None)),  # small: gathering costs more than it saves
        ((), P()),
    ],
)
def test_fsdp_splits_the_largest_dimension_of_large_arrays(shape, expected):
    assert spec_of(".x.kernel", shape, tiny.mesh(fsdp=8)) == expected


def test_fsdp_takes_a_dimension_that_tensor_left():
    mesh = tiny.mesh(data=2, fsdp=2, tensor=2)
    assert spec_of(QUERY, (256, 512), mesh) == P("fsdp", "tensor")
    assert spec_of(DOWN, (512, 256), mesh) == P("tensor", "fsdp")


def test_one_device_splits_nothing():
    assert spec_of(QUERY, (512, 512), tiny.mesh()) == P(None, None)


def test_optimizer_moments_lie_where_their_parameter_lies(monkeypatch):
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 1)
    params = {"attn": {"to_q": {"kernel": jnp.ones((8, 16))}}, "norm": {"scale": jnp.ones(3)}}
    state = {"params": params, "opt": make_optimizer(OptimConfig(), 10).init(params)}
    mesh = tiny.mesh(data=2, fsdp=2, tensor=2)
    shardings = infer_shardings(state, mesh)
    specs = [s.spec for s, x in zip(jax.tree.leaves(shardings), jax.tree.leaves(state), strict=True)
             if x.shape == (8, 16)]  # fmt: skip
    assert specs == [P("fsdp", "tensor")] * 3  # the parameter and both moments


def test_placing_keeps_values_and_splits_memory():
    mesh = tiny.mesh(fsdp=4)
    tree = {"kernel": np.arange(2**16, dtype=np.float32).reshape(256, 256)}
    placed = place(tree, infer_shardings(tree, mesh))["kernel"]
    np.testing.assert_array_equal(placed, tree["kernel"])
    assert {s.data.shape for s in placed.addressable_shards} == {(64, 256)}


def test_a_batch_is_split_over_data_and_fsdp():
    batch = place_batch({"image": np.arange(8)[:, None]}, tiny.mesh(data=2, fsdp=2, tensor=2))
    assert {s.data.shape for s in batch["image"].addressable_shards} == {(2, 1)}
    np.testing.assert_array_equal(batch["image"][:, 0], np.arange(8))
