# SPDX-License-Identifier: Apache-2.0
"""The model's FLOPs: one count on every platform, with every kernel."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import tiny

from digseg_jax.aot import programs
from digseg_jax.aot.shapes import Architecture
from digseg_jax.training.flops import step_flops, traced_flops
from digseg_jax.training.setup import TASKS
from digseg_jax.training.tasks.segmentation import SegmentationTask


def counted(function, *shapes) -> float:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return traced_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def xla_count(function, *shapes) -> float:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


def test_products():
    assert counted(jnp.matmul, (32, 64), (64, 128)) == 2 * 32 * 64 * 128
    einsum = lambda q, k: jnp.einsum("blhd,bmhd->bhlm", q, k)  # noqa: E731
    assert counted(einsum, (2, 5, 3, 8), (2, 7, 3, 8)) == 2 * 2 * 3 * 5 * 7 * 8


def test_a_loop_counts_as_often_as_it_runs_in_both_directions():
    def loop(a, b):
        return jax.lax.map(jax.checkpoint(lambda x: x @ b), a).sum()

    once = 2 * 32 * 64 * 128
    assert counted(loop, (4, 32, 64), (64, 128)) == 4 * once
    assert counted(jax.grad(loop, argnums=(0, 1)), (4, 32, 64), (64, 128)) >= 4 * 2 * once


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [((1, 1), (1, 1)), ((0, 1), (0, 1)), ((0, 0), (0, 0))])
def test_convolutions_and_their_gradients_are_counted_as_xla_counts_them(stride, padding):
    """Which leaves out the padding, and the zeros between numbers in a strided one's gradient."""

    def convolution(x, kernel):
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=dimensions
        )

    def loss(x, kernel):
        return convolution(x, kernel).sum()

    shapes = (2, 10, 8, 6), (3, 3, 6, 4)
    assert counted(convolution, *shapes) == xla_count(convolution, *shapes)
    gradient = jax.value_and_grad(loss, argnums=(0, 1))
    assert counted(gradient, *shapes) == pytest.approx(xla_count(gradient, *shapes), rel=0.01)


@pytest.fixture(scope="module")
def segmentation(folders):
    return SegmentationTask(tiny.config(folders))


def test_a_step_is_counted_as_xla_counts_it(folders, segmentation):
    """Where XLA can: the model as it is written, on a CPU."""
    config = tiny.config(folders, compute__conv="xla")
    options = {"steps": config.train.steps, "seed": config.seed}
    step = programs.lower_step(segmentation, tiny.batch(), tiny.mesh(), config.optim, **options)
    assert step_flops(segmentation, tiny.batch()) == pytest.approx(
        step.cost_analysis()["flops"], rel=0.25
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"compute__attention": "splash", "compute__feed_forward": "fused"},
        {"compute__attention": "cudnn", "model__dtype": "bfloat16"},
        {"compute__attention": "headwise", "compute__conv": "cpu"},
        {"compute__remat": "block"},
        {"compute__vae_batch": 1},
        {"compute__accumulation": 4},
    ],
)
def test_no_kernel_and_no_rematerialization_changes_them(folders, segmentation, changes):
    config = tiny.config(folders, **changes)
    parts = Architecture.of(config.model)
    task = programs.abstract_task(config, parts)
    counted = step_flops(task, programs.train_batch(task, parts, 8))
    assert counted == step_flops(segmentation, tiny.batch())


def test_they_grow_with_the_batch(segmentation):
    assert step_flops(segmentation, tiny.batch(8)) == 2 * step_flops(segmentation, tiny.batch(4))


@pytest.mark.parametrize("kind", ["autoencoder", "prior"])
def test_other_tasks_have_them_too(folders, kind):
    config = tiny.config(folders, task=kind)
    again = dataclasses.replace(config, compute=dataclasses.replace(config.compute, remat="block"))
    costs = [step_flops(TASKS[kind](each), tiny.batch()) for each in (config, again)]
    assert costs[0] == costs[1] > 0
