# SPDX-License-Identifier: Apache-2.0
"""Rematerialization: which results the backward pass keeps and which it recomputes.

This is the only module that knows the policies. Models wrap their units in `block` and `attention`;
parameters, their paths and the results stay the same, only memory and time change.

| mode | kept for the backward pass | computed again |
|---|---|---|
| none | everything | nothing |
| attention | everything but the attention weights | scores and softmax, from q, k and v |
| dots | what `block` keeps, results of weight products and convolutions | norms, activations, scores |
| block | the input of every resnet and transformer | all that happens in it, see below |
| large | the same where a map has more pixels than channels, else everything | all that happens there |

`block`, `large` and `dots` also keep what is marked as `kept`: results as large as a block's input that
are expensive to recompute (of attention, with its normalizers; of the feed-forward part; of a resnet's
first convolution), and small ones (statistics of group norms, projections of timestep and text).
`dots` computes hardly any FLOPs twice; it keeps some eleven maps of a transformer, `block` four.
`large` recomputes only where that saves memory: small maps of many channels are cheap to keep, but
their kernels, the largest, would be read (and, if sharded, gathered) a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from digseg_jax.arraytypes import Array, Float

KEPT = "kept"  # name of results that a block keeps; for kernels that name their own
MODES = ("none", "block", "large", "attention", "dots")
# Bytes of activations per latent cell of a mask: Stable Diffusion's train step at 512 pixels, 4 images
# of 4 masks per chip, bfloat16, mode `block` (aot/RECORD.md). RELATIVE has the other modes.
CELL_BYTES, CELL_CHANNELS = 85e3, 320
RELATIVE = {"block": 1.0, "large": 1.3, "dots": 1.55, "attention": 2.1, "none": 2.1}
Function = Callable[..., Any]


def kept(x: Array) -> Array:
    """Marks x as a result that a block keeps for the backward pass."""
    return checkpoint_name(x, KEPT)


def block(function: Function, mode: str) -> Function:
    """Wraps a resnet or a transformer; its arguments are a map [b, h, w, c], then arrays or None.

    Raises:
      ValueError: unknown mode.
    """
    if mode == "block":
        return _but_kept(function)
    if mode == "large":
        return _if_large(function)
    if mode == "dots":
        both = jax.checkpoint_policies.save_from_both_policies(weight_products, _kept_policy())
        return jax.checkpoint(function, policy=both)
    return _unchanged(function, mode)


def attention(function: Function, mode: str) -> Function:
    """Wraps a function of (q, k, v, mask).

    Raises:
      ValueError: unknown mode.
    """
    return jax.checkpoint(function) if mode == "attention" else _unchanged(function, mode)


def activation_bytes(cells: int, channels: int, dtype: str, mode: str) -> float:
    """Estimated bytes of a U-Net's activations in the train step.

    cells: latent cells of all mask images. channels: at the highest resolution.
    """
    # Bytes per cell grow with the channels and the size of a number, measured at 320 and bfloat16.
    width = channels / CELL_CHANNELS * np.dtype(dtype).itemsize / 2
    return CELL_BYTES * cells * width * RELATIVE[mode]


def _but_kept(function: Function) -> Function:
    """The function with everything recomputed but what is marked as `kept`."""
    return jax.checkpoint(function, policy=_kept_policy())


def _kept_policy() -> Callable[..., bool]:
    """Policy: keep the results that `kept` marks."""
    return jax.checkpoint_policies.save_only_these_names(KEPT)


def _if_large(function: Function) -> Function:
    """Recomputes the function where its map has more pixels than channels (mode `large`)."""
    again = _but_kept(function)

    def choose(x: Float[Array, "b h w c"], *others: Any) -> Any:
        _, h, w, c = x.shape  # static: the choice is made while tracing
        return (again if h * w > c else function)(x, *others)

    return choose


def weight_products(primitive: Any, *_: Any, **params: Any) -> bool:
    """Policy: keep results of convolutions, and of matrix products without a batch dimension.

    Attention's products have one; these large results are the reason to rematerialize.
    """
    if primitive is jax.lax.conv_general_dilated_p:
        return True
    if primitive is jax.lax.dot_general_p:
        # ((contracting), (batch)), each a pair for the left and the right operand.
        _, (batch_dimensions, _) = params["dimension_numbers"]
        return not batch_dimensions
    return False


def _unchanged(function: Function, mode: str) -> Function:
    """The function itself, after checking that the mode is one of MODES."""
    if mode not in MODES:
        raise ValueError(f"rematerialization {mode!r}; legal: {', '.join(MODES)}")
    return function
