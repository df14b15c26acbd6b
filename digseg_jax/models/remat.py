# SPDX-License-Identifier: Apache-2.0
"""Rematerialisation: what the backward pass keeps, and what it computes again.

The one place that knows the policies. Models wrap their units in `block` and `attention`; the
parameters, their paths and the results stay the same, only memory and time change.

| mode | kept for the backward pass | computed again |
|---|---|---|
| none | everything | nothing |
| attention | everything but the attention weights | scores and softmax, from q, k and v |
| dots | what `block` keeps, results of weight products and convolutions | norms, activations, scores |
| block | the input of every resnet and transformer | all that happens in it, see below |
| large | the same where a map has more pixels than channels, else everything | all that happens there |

`block`, `large` and `dots` keep what is `kept` as well: results as large as a block's input that are
dearest to compute again (of attention, with its normalisers, of the feed-forward part, of a resnet's
first convolution), and small ones: statistics of group norms, projections of the timestep and the text.
`dots` computes hardly any FLOPs twice; of a transformer it keeps some eleven maps, `block` four.
`large` is `block` without what it does not pay for: a small map of many channels takes little memory,
but its kernels, which computing it again reads (and, sharded, gathers) once more, are the largest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

from digseg_jax.arraytypes import Array, Float

KEPT = "kept"  # name of results that a block keeps; for kernels that name their own
MODES = ("none", "block", "large", "attention", "dots")
F = TypeVar("F", bound=Callable[..., Any])


def kept(x: Array) -> Array:
    """x, which a block keeps for the backward pass."""
    return checkpoint_name(x, KEPT)


def block(function: F, mode: str) -> F:
    """Wraps a resnet or a transformer; its arguments are maps [b, h, w, c], then arrays (or None)."""
    if mode == "block":
        return _but_kept(function)
    if mode == "large":
        return _if_large(function)
    if mode == "dots":
        both = jax.checkpoint_policies.save_from_both_policies(weight_products, _kept_policy())
        return jax.checkpoint(function, policy=both)
    return _unchanged(function, mode)


def attention(function: F, mode: str) -> F:
    """Wraps a function of (q, k, v, mask)."""
    return jax.checkpoint(function) if mode == "attention" else _unchanged(function, mode)


def _but_kept(function: F) -> F:
    return jax.checkpoint(function, policy=_kept_policy())


def _kept_policy() -> Callable[..., bool]:
    return jax.checkpoint_policies.save_only_these_names(KEPT)


def _if_large(function: F) -> F:
    again = _but_kept(function)

    def choose(x: Float[Array, "b h w c"], *others: Any) -> Any:
        _, h, w, c = x.shape
        return (again if h * w > c else function)(x, *others)

    return choose


def weight_products(primitive: Any, *_: Any, **params: Any) -> bool:
    """Whether to keep the result: of convolutions, and of products without a batch dimension.

    Attention's products have one; they are the large ones, and the reason to rematerialise.
    """
    if primitive is jax.lax.conv_general_dilated_p:
        return True
    if primitive is jax.lax.dot_general_p:
        _, (batch_dimensions, _) = params["dimension_numbers"]
        return not batch_dimensions
    return False


def _unchanged(function: F, mode: str) -> F:
    if mode not in MODES:
        raise ValueError(f"rematerialisation {mode!r}; legal: {', '.join(MODES)}")
    return function
