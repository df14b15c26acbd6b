# SPDX-License-Identifier: Apache-2.0
"""FLOPs of a training step as the model is written: what a model-FLOPs utilization (MFU) refers to.

Counted from the traced loss, so the same on every platform: XLA's own count takes a kernel (Pallas,
cuDNN) for nothing, a loop's body for one run, and what is rematerialized twice; and on accelerators
there is none before a program is compiled.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from digseg_jax.arraytypes import Array, Batch, Params
from digseg_jax.models import functional
from digseg_jax.training.tasks.base import Task, example_keys


def step_flops(task: Task, batch: Batch) -> float:
    """Products and convolutions of the loss of a batch and of its gradient, two FLOPs a
    multiplication, on all devices together.

    task: what it computes through is its `graphdef` and perhaps `vae`; without, it is counted as it is.
    batch: arrays or shapes, the whole batch however many devices and parts share it.
    """
    plain = _as_written(task)
    batch, frozen = (jax.tree.map(_shape, tree) for tree in (batch, plain.frozen))

    def loss(params: Params, frozen: Params, batch: Batch) -> tuple[Array, dict[str, Array]]:
        return plain.loss(params, frozen, batch, example_keys(0, batch["index"]))

    gradient = jax.value_and_grad(loss, has_aux=True)
    return traced_flops(jax.make_jaxpr(gradient)(plain.abstract, frozen, batch).jaxpr)


def _as_written(task: Task) -> Task:
    """The task with its models layer by layer: no kernels, no rematerialization, no slices."""
    plain = copy.copy(task)
    if hasattr(task, "graphdef"):
        plain.graphdef = functional.as_written(task.graphdef, task.abstract)
    vae = getattr(task, "vae", None)
    if vae and "vae" in task.frozen:
        graphdef = functional.as_written(vae.graphdef, task.frozen["vae"])
        plain.vae = dataclasses.replace(vae, graphdef=graphdef, limit=0)
    return plain


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def traced_flops(jaxpr: core.Jaxpr) -> float:
    """Of the products and convolutions of a traced function; a scan counts as often as it runs."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            total += _product_flops(equation)
        elif equation.primitive.name == "conv_general_dilated":
            total += _convolution_flops(equation)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        inner = core.jaxprs_in_params(equation.params)
        total += times * sum(traced_flops(each) for each in inner)
    return total


def _product_flops(equation: core.JaxprEqn) -> float:
    left = equation.invars[0].aval.shape
    (contracted, _), _ = equation.params["dimension_numbers"]
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[d] for d in contracted)


def _convolution_flops(equation: core.JaxprEqn) -> float:
    """Multiplications with numbers of the map, not with its padding and the gaps of a dilation."""
    image, kernel = (v.aval.shape for v in equation.invars)
    result, params = equation.outvars[0].aval.shape, equation.params
    lhs, rhs, out = params["dimension_numbers"]

    # (places of the result, of the kernel) that meet a number of the map, along each axis
    pairs = 1
    for axis, (low, _) in enumerate(params["padding"]):
        pairs *= _meetings(
            (image[lhs[2 + axis]], kernel[rhs[2 + axis]], result[out[2 + axis]]),
            (params["lhs_dilation"][axis], params["rhs_dilation"][axis]),
            params["window_strides"][axis],
            low,
        )

    # input channels of a group stand in the kernel; a batch in groups is a share of it each
    batch, channels = result[out[0]], result[out[1]]
    return 2.0 * batch * channels * kernel[rhs[1]] * pairs


def _meetings(sizes: Sequence[int], dilations: Sequence[int], stride: int, low: int) -> int:
    image, kernel, result = sizes
    starts, steps = stride * np.arange(result)[:, None] - low, dilations[1] * np.arange(kernel)
    places = starts + steps
    inside = (places >= 0) & (places <= (image - 1) * dilations[0])
    return int((inside & (places % dilations[0] == 0)).sum())
