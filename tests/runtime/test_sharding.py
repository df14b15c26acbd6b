# SPDX-License-Identifier: Apache-2.0
"""Where arrays live: the mesh and the rule table."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from digseg_jax.config.schema import MeshConfig, OptimConfig
from digseg_jax.errors import UserError
from digseg_jax.models import functional, partition
from digseg_jax.models.unet import UNet2DConditionModel, UNetConfig
from digseg_jax.models.vae import AutoencoderKL, VaeConfig
from digseg_jax.runtime import sharding
from digseg_jax.runtime.sharding import (
    check_batch,
    describe_memory,
    infer_shardings,
    make_mesh,
    place,
    place_batch,
    replicated_bytes,
    spec_of,
)
from digseg_jax.training.optim import make_optimizer
from digseg_jax.training.step import initial_state

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


SD15 = UNetConfig(in_channels=8, text_adapters=True, text_dim=768)
SD21 = UNetConfig(
    in_channels=8,
    text_adapters=True,
    text_dim=768,
    cross_attention_dim=1024,
    attention_head_dim=(5, 10, 20, 20),
    use_linear_projection=True,
)


@pytest.fixture(scope="module", params=[SD15, SD21], ids=["SD 1.5", "SD 2.1"])
def state(request):
    """A whole train state's shapes."""
    unet = functional.abstract(
        lambda: UNet2DConditionModel(request.param, rngs=functional.FixedRngs())
    )[1]
    config = OptimConfig()
    return jax.eval_shape(lambda p: initial_state(p, make_optimizer(config, 10), config), unet)


class TestFullSize:
    """Stable Diffusion's own shapes; nothing is allocated."""

    @pytest.mark.parametrize("axes", [(1, 8, 1), (2, 64, 1), (1, 4, 8), (4, 16, 2)], ids=str)
    def test_every_large_array_of_the_state_is_split(self, axes, state):
        mesh = AbstractMesh(axes, sharding.AXES)
        shardings = infer_shardings(state, mesh)
        whole = replicated_bytes(state, shardings)
        assert max(whole.values()) < 4 * sharding.FSDP_MIN_SIZE, list(whole.items())[:3]
        total = sum(math.prod(x.shape) * 4 for x in jax.tree.leaves(state))
        assert total > 13e9  # parameters, average and two moments
        assert sum(whole.values()) < 0.01 * total
        pairs = zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True)
        share = sum(math.prod(s.shard_shape(x.shape)) * 4 for x, s in pairs)
        assert share < 1.05 * total / axes[1]

    def test_moments_and_average_lie_like_the_parameters(self, state):
        shardings = infer_shardings(state, AbstractMesh((1, 4, 2), sharding.AXES))
        moments = next(x for x in jax.tree.leaves(
            shardings["opt"], is_leaf=lambda n: hasattr(n, "mu")) if hasattr(x, "mu"))  # fmt: skip
        for tree in (shardings["ema"], moments.mu, moments.nu):
            assert tree == shardings["params"]

    def test_the_autoencoder_is_split_too(self):
        vae = functional.abstract(lambda: AutoencoderKL(VaeConfig(), rngs=functional.FixedRngs()))[1]
        whole = replicated_bytes(vae, infer_shardings(vae, AbstractMesh((1, 64, 1), sharding.AXES)))
        assert max(whole.values()) < 4 * sharding.FSDP_MIN_SIZE


def test_the_report_counts_what_every_device_holds_whole():
    mesh = tiny.mesh(fsdp=8)
    tree = {"a": {"kernel": np.zeros((512, 512), np.float32)}, "bias": np.zeros(1000, np.float32)}
    shardings = infer_shardings(tree, mesh)
    assert replicated_bytes(tree, shardings) == {"bias": 4000}
    line = describe_memory(tree, shardings)
    assert "bias 0.00 MB" in line and "0.001 GB in all" in line


def test_batches_are_placed_ahead_in_their_order_and_none_is_lost():
    taken = []

    def batches():
        for i in range(4):
            taken.append(i)
            yield {"x": np.full((8,), i)}

    ahead = sharding.place_ahead(batches(), tiny.mesh(8))
    seen = []
    for rows, batch in ahead:
        seen.append(int(rows["x"][0]))
        np.testing.assert_array_equal(rows["x"], batch["x"])
        assert len(taken) == min(seen[-1] + 2, 4)
        assert len(batch["x"].sharding.device_set) == 8
    assert seen == [0, 1, 2, 3]


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the arrangement of a mesh looks at."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0
    process_index: int = 0


def chips(slices):
    corners = [(x, y, 0) for y in range(2) for x in range(2)]
    return [Chip(4 * s + i, c, s) for s in range(slices) for i, c in enumerate(corners)]


@pytest.mark.usefixtures("unchecked")
def test_slices_lie_along_the_data_axis_and_chips_of_one_along_the_others():
    made = sharding.arranged(chips(2), [2, 4, 1])
    assert made.shape == (2, 4, 1)
    assert [{d.slice_index for d in row.flat} for row in made] == [{0}, {1}]
    made = sharding.arranged(chips(2), [4, 1, 2])
    assert all(len({d.slice_index for d in row.flat}) == 1 for row in made)
    assert {d.id for d in made.flat} == set(range(8))


@pytest.mark.usefixtures("unchecked")
def test_one_slice_keeps_neighbors_together():
    made = sharding.arranged(chips(1), [1, 4, 1])
    assert {d.id for d in made.flat} == set(range(4))


@pytest.mark.usefixtures("unchecked")
def test_the_gpus_of_a_node_lie_along_the_inner_axes():
    """JAX numbers processes as they come: here those of two nodes by turns."""
    gpus = [Chip(i, (0, 0, 0), i % 2, platform="cuda") for i in range(8)]
    made = sharding.arranged(gpus, [2, 4, 1])
    assert [{d.slice_index for d in row.flat} for row in made] == [{0}, {1}]
    wide = sharding.arranged(gpus, [1, 8, 1])  # beyond a node, over its network
    assert [d.id for d in wide.flat] == [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.mark.usefixtures("unchecked")
def test_fsdp_over_several_slices_is_refused():
    with pytest.raises(UserError, match="config.mesh.data=1: must be a multiple of the 2 slices"):
        sharding.arranged(chips(2), [1, 8, 1])


def test_kernels_are_gathered_over_fsdp_but_not_beside_a_tensor_axis():
    kernel = np.ones((8, 8), np.float32)

    def compiled(**axes):
        mesh = tiny.mesh(**axes)
        place = NamedSharding(mesh, P("fsdp"))
        run = jax.jit(sharding.on_mesh(mesh, partition.gathered), in_shardings=place)
        return run.lower(kernel).compile().output_shardings

    assert compiled(fsdp=4).is_fully_replicated
    assert not compiled(fsdp=4, tensor=2).is_fully_replicated
    assert partition.gathered(kernel) is kernel  # no mesh at all


def test_a_gathered_kernels_gradient_stays_in_parts():
    mesh = tiny.mesh(fsdp=4)
    rng = np.random.default_rng(0)
    x, kernel = (rng.normal(size=s).astype(np.float32) for s in ((8, 512), (512, 256)))
    place = NamedSharding(mesh, sharding.spec_of("", kernel.shape, mesh))

    def loss(kernel, x):
        return jnp.square(x @ partition.gathered(kernel)).sum()

    run = jax.jit(
        sharding.on_mesh(mesh, jax.grad(loss)),
        in_shardings=(place, NamedSharding(mesh, sharding.BATCH)),
    )
    gradient = run(kernel, x)
    assert gradient.sharding.is_equivalent_to(place, 2) and not place.is_fully_replicated
    np.testing.assert_allclose(gradient, x.T @ (2 * x @ kernel), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 4, 100])
@pytest.mark.parametrize("axes", [{}, {"data": 2, "fsdp": 2}])
def test_slices_change_the_order_of_work_and_nothing_else(limit, axes):
    x = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    sizes = []

    def function(part):
        sizes.append(part["x"].shape[0])
        return part["two"][:, None] * part["x"][:, :2]

    def slices(x):
        return partition.in_slices(function, {"x": x, "two": jnp.full(len(x), 2.0)}, limit)

    mesh = tiny.mesh(**axes)
    run = sharding.on_mesh(mesh, slices)
    batch = NamedSharding(mesh, sharding.BATCH)
    compiled = jax.jit(run, in_shardings=batch, out_shardings=batch).lower(x).compile()
    np.testing.assert_array_equal(compiled(x), 2.0 * x[:, :2])
    devices = math.prod(axes.values())
    assert max(sizes) <= (limit or 16) * devices
    assert not re.search(r"all-to-all|collective-permute|all-gather", compiled.as_text())


@pytest.mark.parametrize(
    ("size", "accumulation", "said"),
    [
        (32, 1, "config.train.batch_size=32: must be a multiple of 6: .*nearest: 30 or 36$"),
        (4, 1, "multiple of 6: 6 devices along config.mesh.data and fsdp; nearest: 6$"),
        (12, 4, r"times config.compute.accumulation=4; nearest: 24; or config.compute.accumulation=2$"),
    ],
)
def test_a_batch_that_does_not_divide_is_told_with_the_nearest_that_do(size, accumulation, said):
    mesh = tiny.mesh(3, 2)
    check_batch("config.train.batch_size", 24, mesh, 4)
    with pytest.raises(UserError, match=said):
        check_batch("config.train.batch_size", size, mesh, accumulation)
