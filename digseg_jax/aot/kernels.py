# SPDX-License-Identifier: Apache-2.0
"""FLOPs of the Pallas kernels in a compiled program, which XLA's own count takes for zero."""

from __future__ import annotations

import math
import re

from digseg_jax.aot import hlo

# Matrix products of [queries, keys, width] in each of splash attention's kernels; the backward ones
# compute the scores and the weights' gradient again (jax: splash_attention_kernel.py).
PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
# Kernels of `models.kernels.cross_attention`: number of products, and which operand is k [b, m, c],
# after q [b, l, c] and perhaps dy.
CROSS = {"cross_attention_forward": (2, 1), "cross_attention_backward": (5, 2)}
# Matrix products of [positions, hidden, features] in `models.kernels.feed_forward`; the backward kernel
# computes two of the forward ones again.
FEED_FORWARD = {"feed_forward_forward": 3, "feed_forward_backward": 8}
_OPERANDS = re.compile(r"operand_layout_constraints=\{(.*?\})\}")
_FLOATS = re.compile(r"(?:bf16|f16|f32)\[([\d,]*)\]")  # skips the kernel's tables, which are integers


def kernel_flops(module: hlo.Module) -> float:
    """FLOPs of all kernel calls on a device; calls in a loop count as often as they run."""
    total = 0.0
    for instruction, times, _ in hlo.walk(module, fusions=False):
        if instruction.opcode == "custom-call":
            total += times * _flops(instruction)
    return total


def _flops(instruction: hlo.Instruction) -> float:
    """FLOPs of one custom call by the shapes of its operands; 0 for an unknown one."""
    operands = _OPERANDS.search(instruction.text)
    if not operands:
        return 0.0
    shapes = [[int(n) for n in s.split(",")] for s in _FLOATS.findall(operands[1])]

    # 2 FLOPs (multiply, add) per product of one query, one key and one feature.
    for name, count in PRODUCTS.items():
        if instruction.name.startswith(name):  # q [*b, heads, l, d], k [*b, heads, m, d], v
            return 2.0 * count * math.prod(shapes[0]) * shapes[1][-2]
    for name, (count, place) in CROSS.items():
        if instruction.name.startswith(name):
            return 2.0 * count * math.prod(shapes[0]) * shapes[place][-2]
    for name, count in FEED_FORWARD.items():
        if instruction.name.startswith(name):  # x [n, c] or two such, up [c, 2 h]
            up = next(shape for shape in shapes if shape[0] == shapes[0][1])
            return 2.0 * count * math.prod(shapes[0]) * up[1] / 2
    return 0.0
