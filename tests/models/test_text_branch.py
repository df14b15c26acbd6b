# SPDX-License-Identifier: Apache-2.0
"""The parallel attention against attentions written out by hand, in NumPy and in torch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding

from digseg_jax import trees
from digseg_jax.models import functional
from digseg_jax.models.attention import ParallelAttention, Transformer2DModel
from digseg_jax.models.layers import Compute
from digseg_jax.models.partition import LocalAttention, gathered
from digseg_jax.models.text_branch import start_branch
from digseg_jax.models.unet import UNetConfig
from digseg_jax.runtime import sharding
from digseg_jax.weights import keymap

WIDTH, CONTEXT, TEXT, HEADS, PROMPT = 16, 12, 20, 4, 7
KERNELS = ("plain", "chunked", "headwise")
LIMIT = 1e-4  # relative L2, of each gradient


def layer(attention: str = "plain"):
    """Structure and random parameters of a parallel attention whose three widths differ."""
    graphdef, abstract = functional.abstract(
        lambda: ParallelAttention(
            WIDTH,
            CONTEXT,
            HEADS,
            prompt_length=PROMPT,
            text_features=TEXT,
            compute=Compute(attention=attention),
            rngs=functional.FixedRngs(),
        )
    )
    params = trees.flatten(functional.random_init(abstract, 0))
    params["prompt.embedding"] *= 50.0  # tokens are about 1
    params["scale"] = params["scale"] * 0.7
    return graphdef, trees.unflatten(params)


def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Map, tokens, mask of the tokens, and a target."""
    rng = np.random.default_rng(1)
    x, context = rng.standard_normal((2, 9, WIDTH)), rng.standard_normal((2, 5, TEXT))
    mask = np.array([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
    target = rng.standard_normal((2, 9, WIDTH))
    return x.astype(np.float32), context.astype(np.float32), mask, target.astype(np.float32)


def by_hand(lib, params, x, context, mask):
    """Sum of both attentions, a head at a time, of NumPy's or torch's arrays by their hub keys."""

    def attend(prefix, source, valid):
        q = x @ params[f"{prefix}to_q.weight"].T
        k, v = (source @ params[f"{prefix}to_{name}.weight"].T for name in "kv")
        size, heads = WIDTH // HEADS, []
        for start in range(0, WIDTH, size):
            part = slice(start, start + size)
            logits = lib.einsum("blc,bmc->blm", q[..., part], k[..., part]) * size**-0.5
            weight = lib.exp(logits) * valid[:, None]
            heads.append(lib.einsum("blm,bmc->blc", weight / weight.sum(-1)[..., None], v[..., part]))
        out = lib.concatenate(heads, -1)
        return out @ params[f"{prefix}to_out.0.weight"].T + params[f"{prefix}to_out.0.bias"]

    prompt = params["prompt.weight"][None] + 0 * x[:, :1, :1]  # for every example
    own = attend("", prompt, 0 * prompt[..., 0] + 1)
    return own + params["weight"] * attend("text.", context, mask)


def hub(params) -> dict[str, np.ndarray]:
    flat = trees.flatten(params)
    return {keymap.hub_key(path): keymap.to_hub(path, np.asarray(x)) for path, x in flat.items()}


@pytest.mark.parametrize("attention", KERNELS)
def test_it_is_the_sum_of_two_attentions(attention):
    graphdef, params = layer(attention)
    x, context, mask, _ = arrays()
    got = jax.jit(lambda p, *a: functional.merge(graphdef, p)(*a))(params, x, context, mask)
    wide = {key: value.astype(np.float64) for key, value in hub(params).items()}
    np.testing.assert_allclose(got, by_hand(np, wide, x, context, mask), atol=1e-5)


def test_gradients_are_torchs():
    torch = pytest.importorskip("torch")
    graphdef, params = layer()
    x, context, mask, target = arrays()

    def loss(params, x, context):
        return ((functional.merge(graphdef, params)(x, context, mask) - target) ** 2).mean()

    got, *got_inputs = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(params, x, context)
    leaves = {key: torch.tensor(value, requires_grad=True) for key, value in hub(params).items()}
    inputs = [torch.tensor(array, requires_grad=True) for array in (x, context)]
    result = by_hand(torch, leaves, *inputs, torch.tensor(mask, dtype=torch.float32))
    ((result - torch.tensor(target)) ** 2).mean().backward()

    pairs = {key: (gradient, leaves[key]) for key, gradient in hub(got).items()}
    pairs |= dict(zip(("x", "context"), zip(got_inputs, inputs, strict=True), strict=True))
    for key, (ours, theirs) in pairs.items():
        expected = theirs.grad.numpy()
        error = np.linalg.norm(np.asarray(ours) - expected)
        assert error <= LIMIT * np.linalg.norm(expected) and np.any(expected), (key, error)


def transformer(**compute):
    """Loss and gradient of a transformer whose cross-attention is parallel, as functions of arrays."""
    graphdef, abstract = functional.abstract(
        lambda: Transformer2DModel(
            WIDTH,
            CONTEXT,
            HEADS,
            layers=1,
            groups=4,
            linear_projection=True,
            prompt_length=PROMPT,
            text_features=TEXT,
            compute=Compute(**compute),
            rngs=functional.FixedRngs(),
        )
    )

    def loss(params, x, context, mask):
        return jnp.square(functional.merge(graphdef, params)(x, context, mask)).mean()

    return jax.value_and_grad(loss), functional.random_init(abstract, 0)


def inputs(batch: int):
    """A map, tokens and their mask."""
    rng = np.random.default_rng(2)
    mask = np.arange(5) < rng.integers(1, 6, (batch, 1))
    x, context = rng.standard_normal((batch, 4, 4, WIDTH)), rng.standard_normal((batch, 5, TEXT))
    return x.astype(np.float32), context.astype(np.float32), mask


def same(got, expected):
    """Loss and gradients are equal to rounding, and no gradient is zero."""
    assert float(got[0]) == pytest.approx(float(expected[0]), rel=1e-5)
    for path, value in trees.flatten(expected[1]).items():
        assert np.any(value), path
        np.testing.assert_allclose(
            trees.flatten(got[1])[path], value, rtol=1e-4, atol=1e-6, err_msg=path
        )


@pytest.mark.parametrize(
    ("attention", "remat"), [("chunked", "block"), ("headwise", "attention"), ("plain", "dots")]
)
def test_kernels_and_rematerialization_change_neither_loss_nor_gradient(attention, remat):
    plain, params = transformer()
    other, _ = transformer(attention=attention, remat=remat)
    same(jax.jit(other)(params, *inputs(2)), jax.jit(plain)(params, *inputs(2)))


def test_four_devices_compute_what_one_does(monkeypatch):
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 64)  # else nothing this small is split
    plain, params = transformer()
    expected = jax.jit(plain)(params, *inputs(4))

    mesh = tiny.mesh(data=1, fsdp=2, tensor=2)
    function, _ = transformer(weights=gathered, attention=LocalAttention("plain"))
    shardings, batch = sharding.infer_shardings(params, mesh), NamedSharding(mesh, sharding.BATCH)
    run = jax.jit(
        sharding.on_mesh(mesh, function),
        in_shardings=(shardings, batch, batch, batch),
        out_shardings=(None, shardings),
    )
    got = run(params, *inputs(4))
    same(got, expected)
    specs = {path: str(x.sharding.spec) for path, x in trees.flatten(got[1]).items()}
    text = {path.partition(".attn2.text.")[2] for path, spec in specs.items() if "tensor" in spec}
    assert text - {""} == {"to_q.kernel", "to_k.kernel", "to_v.kernel", "to_out.0.kernel"}
    assert "fsdp" in specs["transformer_blocks.0.attn2.prompt.embedding"]


def test_the_start_copies_projections_and_gives_each_level_its_prompt():
    config = UNetConfig(prompt_length=2, cross_attention_dim=3, text_dim=3)
    levels = len(config.block_out_channels)
    places = ["down_blocks.0", "down_blocks.2", "mid_block", "up_blocks.1", "up_blocks.3"]
    attn2 = "attentions.0.transformer_blocks.0.attn2"
    flat = {}
    for number, place in enumerate(places):
        for name, shape in (("to_q", (4, 4)), ("to_k", (3, 4)), ("to_v", (3, 4)), ("to_out.0", (4, 4))):
            flat[f"{place}.{attn2}.{name}.kernel"] = np.full(shape, number + 1.0)
            # wider text: keys and values cannot be copied
            wide = (5, 4) if name in ("to_k", "to_v") and place == "mid_block" else shape
            flat[f"{place}.{attn2}.text.{name}.kernel"] = np.zeros(wide)
        flat[f"{place}.{attn2}.prompt.embedding"] = np.zeros((2, 3))
    prompts = [np.full((2, 3), 10.0 + level) for level in range(levels)]
    got = trees.flatten(start_branch(trees.unflatten(flat), prompts))

    for place, level in zip(places, (0, 2, 3, 2, 0), strict=True):
        np.testing.assert_array_equal(got[f"{place}.{attn2}.prompt.embedding"], prompts[level])
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            first, second = (got[f"{place}.{attn2}.{kind}{name}.kernel"] for kind in ("", "text."))
            copied = name == "to_q" or (name != "to_out.0" and place != "mid_block")
            assert np.array_equal(first, second) if copied else not np.any(second), (place, name)
