# SPDX-License-Identifier: Apache-2.0
"""How much of a program's results is there at one time."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from digseg_jax.aot import programs
from digseg_jax.aot.liveness import peak_bytes
from digseg_jax.aot.shapes import Architecture
from digseg_jax.config.parse import parse
from digseg_jax.config.schema import MeshConfig
from digseg_jax.recipes import stable_diffusion
from digseg_jax.runtime.sharding import make_mesh

N = 64 * 64 * 4  # bytes of a matrix
GB = 1e9


def peak(function, *shapes, dtype=jnp.float32, **options) -> float:
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return peak_bytes(jax.make_jaxpr(function)(*arguments).jaxpr, **options)


@pytest.mark.parametrize(
    ("function", "matrices"),
    [
        (lambda x: x @ x, 1),
        (lambda x: x @ x @ x @ x, 2),  # of a chain: one that is read, one that is written
        (lambda x: (x @ x).T.reshape(-1), 1),  # a view
        (lambda x: (x @ x, x @ x @ x), 3),  # what is returned stays
        (lambda x: jax.jit(lambda y: y @ y @ y)(x), 2),  # inside
        (lambda x: (x @ x, (x + 1).sum())[0], 1),  # what nobody reads is not there
        (lambda x: jax.lax.scan(lambda c, _: (c @ x @ x @ x, None), x, length=9)[0], 2),
    ],
)
def test_results_are_there_until_they_are_read(function, matrices):
    assert peak(function, (64, 64)) == matrices * N


def test_precision_and_the_share_of_what_is_returned():
    assert peak(lambda x: x @ x, (64, 64), dtype=jnp.bfloat16) == N / 2
    assert peak(lambda x: x @ x, (64, 64), output_share=0.25) == N / 4


def test_rematerialization_keeps_less():
    def gradient(remat):
        def layer(x):
            return jnp.tanh(jnp.tanh(jnp.tanh(x)))

        layer = jax.checkpoint(layer) if remat else layer
        return jax.grad(lambda x: layer(layer(layer(layer(x)))).sum())

    assert peak(gradient(True), (64, 64)) < peak(gradient(False), (64, 64))


@pytest.mark.parametrize(
    ("chips", "images", "allotted"),
    [(8, 4, 2.62 * GB), pytest.param(8, 16, 5.51 * GB, marks=pytest.mark.slow)],
)
def test_against_what_the_tpu_compiler_allots(chips, images, allotted):
    """The U-Net of Stable Diffusion 2.1, images a chip, 16 chips there (aot/RECORD.md): not too little,
    and a quarter too much at most."""
    config = parse(stable_diffusion("sd21", "ade20k"))
    compute = dataclasses.replace(config.compute, attention="splash")
    options = dataclasses.replace(config.compile, unet_only=True, per_device_batch=images)
    config = dataclasses.replace(config, compute=compute, compile=options)
    mesh = make_mesh(MeshConfig(1, chips, 1), jax.devices()[:chips])
    parts = Architecture.of(config.model)
    (estimate,) = programs.temporary_bytes(programs.abstract_task(config, parts), parts, mesh)
    assert allotted <= estimate <= 1.25 * allotted
