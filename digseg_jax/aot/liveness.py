# SPDX-License-Identifier: Apache-2.0
"""Memory of a traced program's results, in the order and the precision in which it is written.

An estimate where there is no compiler for the device. XLA:CPU's own accounting cannot replace it: it
computes bfloat16 in float32, keeps transposed copies of kernels, and came to 9.0 GB where the TPU
compiler allots 2.6 (RECORD.md).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from jax.extend import core
from jax.interpreters import partial_eval

# Operations whose results XLA does not store: other shapes and types of an existing array.
VIEWS = {
    "broadcast_in_dim", "convert_element_type", "copy", "expand_dims", "iota", "name",
    "optimization_barrier", "reduce_precision", "reshape", "sharding_constraint", "squeeze",
    "transpose",
}  # fmt: skip


def peak_bytes(jaxpr: core.Jaxpr, *, output_share: float = 1.0) -> float:
    """Most bytes of results alive at one time: returned ones included, arguments excluded.

    Every result except `VIEWS` is taken to be stored until its last use. XLA stores less where it
    fuses, and more where it fetches ahead or pads.

    output_share: part of the returned bytes that one device stores.
    """
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))  # without dead code
    return _peak(needed, output_share)


def _peak(jaxpr: core.Jaxpr, output_share: float) -> float:
    """`peak_bytes` of a jaxpr without dead code."""
    sizes, last, returned = _lives(jaxpr)
    for variable in returned:
        sizes[variable] *= output_share

    # Results that end with the i-th equation, which is their last use.
    ends: dict[int, list[Any]] = {}
    for variable in sizes:
        ends.setdefault(last[variable], []).append(variable)

    # An equation's own results, or the peak inside of it, are added to what is alive. Bodies of loops
    # and branches are taken to free everything when they end.
    live = peak = 0.0
    for i, equation in enumerate(jaxpr.eqns):
        stored = sum(sizes.get(variable, 0.0) for variable in equation.outvars)
        inner = [_peak(each, 1.0) for each in core.jaxprs_in_params(equation.params)]
        peak = max(peak, live + max([stored, *inner]))
        live += stored - sum(sizes[variable] for variable in ends.get(i, []))
    return max(peak, live)


def _lives(jaxpr: core.Jaxpr) -> tuple[dict[Any, float], dict[Any, int], Collection[Any]]:
    """Bytes of the stored results, the place of each one's last use, and the returned ones."""
    sizes: dict[Any, float] = {}
    last: dict[Any, int] = {}
    sources: dict[Any, set[Any]] = {}  # view -> the results that it shows

    def shown(variables: list[Any]) -> set[Any]:
        """The stored results behind variables: a use of a view is a use of what it shows."""
        named = [v for v in variables if not isinstance(v, core.Literal)]
        return set().union(*(sources.get(v, {v}) for v in named))

    for i, equation in enumerate(jaxpr.eqns):
        read = shown(equation.invars)
        last |= dict.fromkeys(read, i)
        for variable in equation.outvars:
            if equation.primitive.name in VIEWS:
                sources[variable] = read
            else:
                sizes[variable], last[variable] = _bytes(variable), i

    # Returned results live to the end. Arguments are among `last`, but not among `sizes`.
    returned = shown(jaxpr.outvars)
    last |= dict.fromkeys(returned, len(jaxpr.eqns))
    return sizes, last, [v for v in returned if v in sizes]


def _bytes(variable: Any) -> float:
    """Bytes of a variable; 0 for tokens and the like."""
    aval = variable.aval
    if not hasattr(aval, "shape"):
        return 0.0
    return float(math.prod(aval.shape) * aval.dtype.itemsize)
