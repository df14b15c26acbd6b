# SPDX-License-Identifier: Apache-2.0
"""The memory that a traced program's results take, in the order and the precision in which it is
written: an estimate where no compiler for the device is at hand.

XLA:CPU's own accounting will not do in its place: it computes bfloat16 in float32, keeps transposed
copies of kernels, and came to 9.0 GB where the TPU compiler allots 2.6 (RECORD.md).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from jax.extend import core
from jax.interpreters import partial_eval

# results that XLA does not store by themselves: other shapes and types of what is there already
VIEWS = {
    "broadcast_in_dim", "convert_element_type", "copy", "expand_dims", "iota", "name",
    "optimization_barrier", "reduce_precision", "reshape", "sharding_constraint", "squeeze",
    "transpose",
}  # fmt: skip


def peak_bytes(jaxpr: core.Jaxpr, *, output_share: float = 1.0) -> float:
    """Most bytes of results at one time, those that are returned included, the arguments not.

    Every result but `VIEWS` is taken to be stored until its last use. What XLA fuses is not stored,
    what it fetches ahead or pads is more than this.

    output_share: of the bytes of what is returned, the part that a device stores.
    """
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _peak(needed, output_share)


def _peak(jaxpr: core.Jaxpr, output_share: float) -> float:
    sizes, last, returned = _lives(jaxpr)
    for variable in returned:
        sizes[variable] *= output_share

    # results that are not needed any more after the i-th equation
    ends: dict[int, list[Any]] = {}
    for variable in sizes:
        ends.setdefault(last[variable], []).append(variable)

    live = peak = 0.0
    for i, equation in enumerate(jaxpr.eqns):
        stored = sum(sizes.get(variable, 0.0) for variable in equation.outvars)
        inner = [_peak(each, 1.0) for each in core.jaxprs_in_params(equation.params)]
        peak = max(peak, live + max([stored, *inner]))
        live += stored - sum(sizes[variable] for variable in ends.get(i, []))
    return max(peak, live)


def _lives(jaxpr: core.Jaxpr) -> tuple[dict[Any, float], dict[Any, int], Collection[Any]]:
    """Bytes of the stored results, the place of each one's last use, and those that are returned."""
    sizes: dict[Any, float] = {}
    last: dict[Any, int] = {}
    sources: dict[Any, set[Any]] = {}  # of a view: the results that it shows

    def shown(variables: list[Any]) -> set[Any]:
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
    returned = shown(jaxpr.outvars)
    last |= dict.fromkeys(returned, len(jaxpr.eqns))
    return sizes, last, [v for v in returned if v in sizes]


def _bytes(variable: Any) -> float:
    aval = variable.aval
    if not hasattr(aval, "shape"):
        return 0.0
    return float(math.prod(aval.shape) * aval.dtype.itemsize)
