# SPDX-License-Identifier: Apache-2.0
"""Attention: every implementation computes one function, forward and backward, on any mesh."""

from __future__ import annotations

import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.extend import core
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from digseg_jax.aot.cuda import assumed_cudnn
from digseg_jax.errors import UserError
from digseg_jax.models import functional
from digseg_jax.models.attention import attention
from digseg_jax.models.kernels import attention as kernels
from digseg_jax.models.partition import LocalAttention
from digseg_jax.models.unet import UNet2DConditionModel
from digseg_jax.runtime.sharding import BATCH, on_mesh
from digseg_jax.training.tasks.parts import compute_options

LIMIT = 2e-5  # relative L2, float32
INTERPRETED = partial(kernels.splash, interpret=True)


def arrays(b: int, length: int, keys: int, heads: int = 2, d: int = 8) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(b, length, heads, d), (b, keys, heads, d), (b, keys, heads, d)]
    return [2.0 * rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def reference(q, k, v, mask=None) -> np.ndarray:
    """One query at a time, in float64."""
    out = np.zeros(q.shape)
    for b, i, h in np.ndindex(q.shape[:3]):
        logits = k[b, :, h].astype(np.float64) @ q[b, i, h] / np.sqrt(q.shape[-1])
        if mask is not None and mask[b].any():
            logits[~mask[b]] = -np.inf
        elif mask is not None:
            logits[:] = 0.0
        weights = np.exp(logits - logits.max())
        out[b, i, h] = weights / weights.sum() @ v[b, :, h]
    return out


def relative_l2(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def gradients(function, q, k, v):
    loss = jax.jit(jax.grad(lambda *a: jnp.square(function(*a)).sum(), argnums=(0, 1, 2)))
    return loss(q, k, v)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(kernels, "QUERY_CHUNK", 16)
    monkeypatch.setattr(kernels, "HEADWISE_CHUNK", 16 * 9)
    monkeypatch.setattr(kernels, "HEADWISE_FEW", 100)


@pytest.mark.parametrize("name", ["plain", "chunked", "headwise"])
@pytest.mark.parametrize("length", [7, 16, 48, 50])
def test_against_one_query_at_a_time(small_chunks, name, length):
    q, k, v = arrays(2, length, 9)
    mask = np.arange(9)[None] < np.array([[9], [4]])
    assert relative_l2(attention(q, k, v, None, name), reference(q, k, v)) <= LIMIT
    assert relative_l2(attention(q, k, v, mask, name), reference(q, k, v, mask)) <= LIMIT


@pytest.mark.parametrize("name", ["plain", "chunked"])
def test_a_row_without_any_key_attends_evenly(name):
    q, k, v = arrays(2, 5, 3)
    mask = np.array([[True, True, False], [False, False, False]])
    assert relative_l2(attention(q, k, v, mask, name), reference(q, k, v, mask)) <= LIMIT


@pytest.mark.parametrize("name", ["chunked", "headwise"])
@pytest.mark.parametrize("length", [48, 50])
def test_gradients_of_chunks_are_those_of_plain(small_chunks, name, length):
    q, k, v = arrays(1, length, 9)
    for got, expected in zip(
        gradients(kernels.IMPLEMENTATIONS[name], q, k, v),
        gradients(kernels.plain, q, k, v),
        strict=True,
    ):
        assert relative_l2(got, expected) <= LIMIT


def largest_intermediate(function, *args) -> int:
    """Elements of the largest array that any equation of the traced function makes."""
    largest, pending = 0, [jax.make_jaxpr(function)(*args).jaxpr]
    while pending:
        for equation in pending.pop().eqns:
            largest = max([largest, *(v.aval.size for v in equation.outvars)])
            pending += core.jaxprs_in_params(equation.params)
    return largest


def test_chunks_bound_the_memory_of_forward_and_backward():
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays(1, 3840, 3840, heads=3, d=4)]

    def largest(name):
        loss = jax.grad(lambda *a: jnp.square(attention(*a, None, name)).sum(), argnums=(0, 1, 2))
        return largest_intermediate(loss, *shapes)

    assert largest("plain") == 3 * 3840 * 3840
    assert largest("chunked") == 3 * 256 * 3840
    assert largest("headwise") == 3840 * 480  # of 8 MB, one head at a time


def test_splash_equals_plain_forward_and_backward():
    q, k, v = arrays(1, 256, 384)
    got, expected = INTERPRETED(q, k, v), reference(q, k, v)
    assert relative_l2(got, expected) <= LIMIT
    for got, expected in zip(
        gradients(INTERPRETED, q, k, v), gradients(kernels.plain, q, k, v), strict=True
    ):
        assert relative_l2(got, expected) <= 10 * LIMIT


@pytest.mark.parametrize(("length", "keys", "masked"), [(100, 128, 0), (128, 150, 0), (256, 256, 1)])
def test_what_splash_blocks_do_not_fit_is_computed_all_the_same(length, keys, masked):
    q, k, v = arrays(1, length, keys)
    mask = np.arange(keys)[None] < 50 if masked else None
    assert relative_l2(kernels.splash(q, k, v, mask), reference(q, k, v, mask)) <= LIMIT


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (8, 1, 1), (1, 2, 4)])
def test_each_device_computes_its_own_examples_and_heads(shape):
    seen = []

    def kernel(q, k, v, mask=None):
        seen.append(q.shape)
        return INTERPRETED(q, k, v, mask)

    data, fsdp, tensor = shape
    mesh = tiny.mesh(*shape)
    q, k, v = arrays(4, 128, 128, d=4)
    local = LocalAttention(kernel)
    sharding = NamedSharding(mesh, BATCH if data < 8 else P())
    step = jax.jit(on_mesh(mesh, local), in_shardings=sharding)
    assert relative_l2(step(q, k, v), reference(q, k, v)) <= LIMIT
    batch = 4 // (data * fsdp) if 4 % (data * fsdp) == 0 else 4
    heads = 2 // tensor if 2 % tensor == 0 else 2
    assert seen == [(batch, 128, heads, 4)]


@pytest.mark.parametrize("name", ["plain", "headwise"])
def test_the_mask_is_split_with_its_examples(name, monkeypatch):
    monkeypatch.setattr(kernels, "HEADWISE_FEW", 1)
    mesh = tiny.mesh(2, 2, 2)
    q, k, v = arrays(4, 6, 5)
    mask = np.arange(5)[None] < np.array([[5], [2], [1], [4]])
    step = on_mesh(mesh, LocalAttention(name))
    got = jax.jit(step, in_shardings=NamedSharding(mesh, BATCH))(q, k, v, mask)
    assert relative_l2(got, reference(q, k, v, mask)) <= LIMIT


# latents of 64x64 and 96x96 (512 and 768 pixels) and the maps below them, with the widths of a head
# that Stable Diffusion 1.5 and 2.1 have there; at last the autoencoder's one head
SD15 = [(64, 40), (32, 80), (16, 160), (8, 160), (96, 40), (48, 80), (24, 160), (12, 160)]
SD21 = [(64, 64), (32, 64), (16, 64), (8, 64), (96, 64), (48, 64), (24, 64), (12, 64)]
FUSED = {(64, 40), (32, 80), (96, 40), (48, 80)} | {(side, 64) for side in (64, 32, 16, 96, 48, 24)}
WIDE = [(64, 512), (96, 512)]


def lowered_for_cuda(length, keys, d, masked, dtype=jnp.bfloat16) -> str:
    """The program of forward and backward as JAX hands it to the compiler of an NVIDIA GPU."""
    q, k = (jax.ShapeDtypeStruct((2, n, 2, d), dtype) for n in (length, keys))
    mask = (jax.ShapeDtypeStruct((2, keys), bool),) if masked else ()

    def loss(q, k, v, *mask):
        return kernels.cudnn(q, k, v, *mask).astype(jnp.float32).sum()

    with assumed_cudnn():
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, k, *mask)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("side", "d"), sorted({*SD15, *SD21, *WIDE}))
def test_cudnn_computes_the_self_attention_of_large_maps(side, d):
    text = lowered_for_cuda(side**2, side**2, d, masked=False)
    for call in ("@__cudnn$fmhaSoftmax(", "@__cudnn$fmhaSoftmaxBackward("):
        assert (call in text) == ((side, d) in FUSED), call


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("keys", [77, 78, 16, 128, 333])
@pytest.mark.parametrize(("side", "d"), [(64, 40), (32, 80), (8, 160), (96, 64), (12, 64)])
def test_cudnn_is_never_asked_for_text(side, d, keys, masked):
    assert "cudnn" not in lowered_for_cuda(side**2, keys, d, masked)


def test_cudnn_is_never_asked_for_32_bits_or_a_mask():
    assert "cudnn" not in lowered_for_cuda(4096, 4096, 40, masked=False, dtype=jnp.float32)
    assert "cudnn" not in lowered_for_cuda(4096, 256, 40, masked=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("length", "keys", "d"), [(320, 77, 8), (144, 144, 64), (320, 320, 160)])
def test_what_cudnn_does_not_take_is_computed_all_the_same(length, keys, d, masked):
    q, k, v = arrays(2, length, keys, d=d)
    mask = np.arange(keys)[None] < np.array([[keys], [keys // 2]]) if masked else None
    got, expected = kernels.cudnn(q, k, v, mask), kernels.plain(q, k, v, mask)
    assert relative_l2(got, expected) <= LIMIT
    both = [partial(kernel, mask=mask) for kernel in (kernels.cudnn, kernels.plain)]
    for got, expected in zip(*(gradients(kernel, q, k, v) for kernel in both), strict=True):
        assert relative_l2(got, expected) <= LIMIT


def test_cudnn_works_on_each_devices_examples_and_heads():
    """Forward and backward: nothing is left to XLA's partitioner."""
    mesh = tiny.mesh(2, 2, 2)
    q = jax.ShapeDtypeStruct((4, 256, 8, 64), jnp.bfloat16)

    def loss(q, k, v):
        return LocalAttention("cudnn")(q, k, v).astype(jnp.float32).sum()

    step = jax.jit(on_mesh(mesh, jax.grad(loss)), in_shardings=NamedSharding(mesh, BATCH))
    with assumed_cudnn():
        text = step.trace(q, q, q).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "@__cudnn$fmhaSoftmax" in line]
    assert len(calls) == 2 and all("tensor<1x256x4x64xbf16>" in line for line in calls)


def test_an_unknown_name_lists_the_legal_ones():
    with pytest.raises(ValueError, match="'flash'; legal: plain, chunked, headwise, splash, cudnn"):
        attention(*arrays(1, 2, 2), None, "flash")


@pytest.mark.parametrize("name", ["splash", "cudnn"])
def test_a_kernel_of_another_platform_is_refused_by_name(folders, name):
    config = tiny.config(folders, compute__attention=name, model__dtype="bfloat16")
    with pytest.raises(UserError, match=f"attention='{name}'.*legal: auto, plain, chunked") as caught:
        tiny.for_devices(config, jax.devices())
    assert "cpu" in tiny.one_line(caught.value)
    # compiling for a platform that is not there needs the model all the same
    assert compute_options(config.model, config.compute)["attention"] == LocalAttention(name)


def test_cudnn_needs_16_bits(folders):
    with pytest.raises(UserError, match="attention='cudnn'.*bfloat16"):
        tiny.config(folders, compute__attention="cudnn")


@pytest.mark.parametrize("name", ["plain", "chunked", "headwise"])
def test_these_run_on_the_cpus_here(folders, name):
    config = tiny.config(folders, compute__attention=name)
    assert tiny.for_devices(config, jax.devices()).compute.attention == name


def described(platform: str, capability: str | None = None) -> types.SimpleNamespace:
    return types.SimpleNamespace(platform=platform, compute_capability=capability)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        (described("tpu"), "bfloat16", "splash"),
        (described("tpu"), "float32", "splash"),
        (described("gpu", "9.0"), "bfloat16", "cudnn"),
        (described("cuda", "8.0"), "bfloat16", "cudnn"),
        (described("gpu", "12.0"), "bfloat16", "cudnn"),
        (described("gpu", "7.5"), "bfloat16", "chunked"),  # a T4
        (described("cuda", "9.0"), "float32", "chunked"),
        (described("gpu", "gfx942"), "bfloat16", "chunked"),  # AMD's
        (described("cpu"), "bfloat16", "headwise"),
    ],
)
def test_auto_is_the_best_that_the_devices_run(folders, device, dtype, expected):
    config = tiny.config(folders, compute__attention="auto", model__dtype=dtype)
    assert tiny.for_devices(config, [device]).compute.attention == expected
    assert compute_options(config.model, config.compute)["attention"] == "chunked"  # where nobody asked


@pytest.mark.usefixtures("unchecked")
def test_cudnn_on_a_gpu_before_ampere_is_refused_by_name(folders):
    config = tiny.config(folders, compute__attention="cudnn", model__dtype="bfloat16")
    with pytest.raises(UserError, match="cudnn' needs a GPU of compute capability 8.0.* have 7.0"):
        tiny.for_devices(config, [described("gpu", "7.0")])
    with pytest.raises(UserError, match="cudnn' runs on NVIDIA's GPUs only, .* the kind 'gfx942'"):
        tiny.for_devices(config, [described("gpu", "gfx942")])


def test_a_model_takes_a_function():
    calls = []

    def counting(q, k, v, mask=None):
        calls.append(q.shape)
        return kernels.plain(q, k, v, mask)

    graphdef, params = functional.abstract(
        lambda: UNet2DConditionModel(tiny.UNET, rngs=functional.FixedRngs(), attention=counting)
    )
    jax.eval_shape(
        lambda p, x, t, c: functional.merge(graphdef, p)(x, t, c),
        params,
        jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
        jax.ShapeDtypeStruct((1, 5, tiny.UNET.cross_attention_dim), jnp.float32),
    )
    assert len(calls) == 2 * 4  # self- and cross-attention of each transformer: down, mid, two up
