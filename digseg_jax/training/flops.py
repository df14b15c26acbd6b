# SPDX-License-Identifier: Apache-2.0
"""FLOPs of a training step as the model is written, to which model-FLOPs utilization (MFU) refers.

Counted from the traced loss, and therefore the same on every platform. XLA's own count would not do: it
counts a kernel (Pallas, cuDNN) as nothing, a loop's body once, and rematerialized work twice; and on
accelerators there is no count before a program is compiled.
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

from digseg_jax.arraytypes import Array, Batch, Params, Shapes
from digseg_jax.models import functional
from digseg_jax.training.tasks.base import Trainable, example_keys


def step_flops(task: Trainable, batch: Batch | Shapes) -> float:
    """FLOPs of the loss and its gradient for one batch, on all devices together.

    Only matrix products and convolutions count, two FLOPs per multiplication.

    Args:
      task: its models are its `graphdef` and perhaps `vae`; a task without these is counted as it is.
      batch: arrays or shapes; the whole batch, however many devices and microbatches share it.
    """
    plain = _as_written(task)
    batch, frozen = (jax.tree.map(_shape, tree) for tree in (batch, plain.frozen))

    def loss(params: Params, frozen: Params, batch: Batch) -> tuple[Array, dict[str, Array]]:
        return plain.loss(params, frozen, batch, example_keys(0, batch["index"]))

    gradient = jax.value_and_grad(loss, has_aux=True)
    return traced_flops(jax.make_jaxpr(gradient)(plain.abstract, frozen, batch).jaxpr)


def _as_written(task: Trainable) -> Trainable:
    """The task with its models layer by layer: no kernels, no rematerialization, no slices."""
    plain: Any = copy.copy(task)
    if hasattr(task, "graphdef"):
        plain.graphdef = functional.as_written(task.graphdef, task.abstract)

    vae = getattr(task, "vae", None)
    if vae and "vae" in task.frozen:
        graphdef = functional.as_written(vae.graphdef, task.frozen["vae"])
        # limit=0: no bound on the memory of the autoencoder, so nothing is computed in slices.
        plain.vae = dataclasses.replace(vae, graphdef=graphdef, limit=0)
    return plain


def _dimensions(variable: Any) -> tuple[int, ...]:
    """Of an array of a traced function."""
    return variable.aval.shape


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def traced_flops(jaxpr: core.Jaxpr) -> float:
    """FLOPs of the products and convolutions of a traced function.

    A scan's body counts as often as it runs. A while loop's and both branches of a condition count
    once.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            total += _product_flops(equation)
        elif equation.primitive.name == "conv_general_dilated":
            total += _convolution_flops(equation)

        # Functions inside the equation: bodies of loops, jitted and differentiated functions.
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        inner = core.jaxprs_in_params(equation.params)
        total += times * sum(traced_flops(each) for each in inner)
    return total


def _product_flops(equation: core.JaxprEqn) -> float:
    """Two FLOPs for each element of the result and each contracted position."""
    left = _dimensions(equation.invars[0])
    (contracted, _), _ = equation.params["dimension_numbers"]
    return 2.0 * math.prod(_dimensions(equation.outvars[0])) * math.prod(left[d] for d in contracted)


def _convolution_flops(equation: core.JaxprEqn) -> float:
    """Two FLOPs per multiplication by an input element; padding and dilation gaps are not counted."""
    image, kernel = (_dimensions(v) for v in equation.invars)
    result, params = _dimensions(equation.outvars[0]), equation.params
    lhs, rhs, out = params["dimension_numbers"]

    # Pairs of (position in the result, position in the kernel) that meet an element of the input; they
    # are counted along each axis on its own, and multiply.
    pairs = 1
    for axis, (low, _) in enumerate(params["padding"]):
        pairs *= _meetings(
            (image[lhs[2 + axis]], kernel[rhs[2 + axis]], result[out[2 + axis]]),
            (params["lhs_dilation"][axis], params["rhs_dilation"][axis]),
            params["window_strides"][axis],
            low,
        )

    # kernel[rhs[1]] is the input channels of one group. A gradient that groups the batch has a share of
    # the batch in each group, which the same formula covers.
    batch, channels = result[out[0]], result[out[1]]
    return 2.0 * batch * channels * kernel[rhs[1]] * pairs


def _meetings(sizes: Sequence[int], dilations: Sequence[int], stride: int, low: int) -> int:
    """Pairs of positions in result and kernel that meet an element of the input, along one axis.

    Args:
      sizes: of the input, the kernel and the result.
      dilations: of the input and the kernel.
      stride: of the window.
      low: padding before the input.
    """
    image, kernel, result = sizes

    # Positions in the dilated input: [result, kernel].
    starts, steps = stride * np.arange(result)[:, None] - low, dilations[1] * np.arange(kernel)
    places = starts + steps

    # Elements of the input lie at multiples of its dilation; between them are gaps.
    inside = (places >= 0) & (places <= (image - 1) * dilations[0])
    return int((inside & (places % dilations[0] == 0)).sum())
