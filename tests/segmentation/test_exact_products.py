# SPDX-License-Identifier: Apache-2.0
"""Where products decide by small differences, no device may round their factors."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from digseg_jax.config.schema import ComputeConfig, ModelConfig
from digseg_jax.segmentation import prompt_bank
from digseg_jax.segmentation.latent_probe import LatentProbe
from digseg_jax.segmentation.mask_loss import latent_evidence, palette_logits
from digseg_jax.segmentation.palette import decode_palette
from digseg_jax.training.tasks.parts import encode_bank, load_tower, load_vae

LATENT, COLORS = jnp.ones((1, 2, 2, 4)), jnp.eye(3, 4)
HIGHEST = (jax.lax.Precision.HIGHEST,) * 2


@pytest.mark.parametrize(
    "function",
    [
        lambda: decode_palette(jnp.ones((1, 4, 4, 3)), jnp.eye(3)),
        lambda: palette_logits(LATENT, COLORS),
        lambda: jax.grad(lambda x: palette_logits(x, COLORS).sum())(LATENT),
        lambda: latent_evidence(LATENT, jnp.stack([-LATENT[0], LATENT[0]])),
        lambda: LatentProbe(np.ones(4, np.float32), 0.5, 1.0)(LATENT),
    ],
)
def test_masks_are_read_with_all_bits(function):
    found = [e.params["precision"] for e in equations(jax.make_jaxpr(function)().jaxpr)]
    assert found and set(found) == {HIGHEST}


def equations(jaxpr):
    """All products of a traced function, inner functions included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", None)
            if inner is not None:
                yield from equations(inner)


@pytest.mark.parametrize(("dtype", "expected"), [("float32", "highest"), ("bfloat16", None)])
def test_the_constants_of_a_codec_are_too(folders, dtype, expected, monkeypatch):
    """Not with 16-bit activations: their products lose nothing."""
    vae, params = load_vae(ModelConfig(vae=folders["vae"], dtype=dtype), ComputeConfig())
    seen = []

    def watched(name):
        own = getattr(type(vae), name)

        def call(self, *arguments):
            seen.append(jax.config.jax_default_matmul_precision)
            return own(self, *arguments)

        monkeypatch.setattr(type(vae), name, call)

    watched("encode")
    watched("decode")
    image = np.random.default_rng(0).uniform(-1, 1, (1, 32, 32, 3)).astype(np.float32)
    there = vae.on_host(params).round_trip(image)
    assert seen == [expected] * 2 and there.shape == image.shape

    # On a CPU, which never rounds, nothing changes.
    plain = jax.jit(vae.decode)(params, jax.jit(vae.encode)(params, image))
    np.testing.assert_array_equal(there, plain)


def test_so_are_the_texts(folders, monkeypatch):
    seen, real = [], prompt_bank._encode

    def watched(*arguments):
        seen.append(jax.config.jax_default_matmul_precision)
        return real(*arguments)

    monkeypatch.setattr(prompt_bank, "_encode", watched)
    model = dataclasses.replace(ModelConfig(), text=folders["text"])
    encode_bank(load_tower(model), ("water",), model)
    assert seen == ["highest"] and jax.config.jax_default_matmul_precision is None
