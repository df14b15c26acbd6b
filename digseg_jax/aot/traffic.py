# SPDX-License-Identifier: Apache-2.0
"""Computing and traffic of a compiled program, where XLA's own count is not what is needed.

XLA counts a loop's body once, and counts on-chip copies like traffic with the device's memory: in a
program that fetches its operands ahead, every byte up to four times.
"""

from __future__ import annotations

import math
import re

import numpy as np

from digseg_jax.aot.hlo import NO_TRAFFIC, Instruction, Module, Shape, walk


def loop_corrections(module: Module) -> tuple[float, float]:
    """FLOPs and bytes of loop bodies beyond their first run, which XLA's cost analysis leaves out."""
    # Products count inside of fusions too, traffic does not: fused results are not buffers.
    flops = moved = 0.0
    for instruction, times, where in walk(module, fusions=True):
        if times > 1 and instruction.opcode in ("convolution", "dot"):
            flops += (times - 1) * _product_flops(instruction, module.named[where])
    for instruction, times, where in walk(module, fusions=False):
        if times > 1 and instruction.opcode not in NO_TRAFFIC:
            moved += (times - 1) * _traffic(instruction, module.named[where])
    return flops, moved


def memory_traffic(module: Module) -> float:
    """Bytes read from and written to the device's main memory; loops count as often as they run.

    Arrays in on-chip memory cost nothing; an asynchronous copy counts where it starts.
    """
    moved = 0.0
    for instruction, times, where in walk(module, fusions=False):
        if instruction.opcode in NO_TRAFFIC or instruction.opcode.endswith("-done"):
            continue

        own = module.named[where]
        inputs = [own[name].shapes for name in instruction.operands if name in own]
        if instruction.opcode in ("copy-start", "slice-start"):
            moved += times * _prefetched(instruction, inputs[0][0])
        else:
            moved += times * _traffic(instruction, own, main_memory=True)
    return moved


def _prefetched(instruction: Instruction, source: Shape) -> float:
    """Bytes moved in main memory by an asynchronous copy: its size, once for either end that is there.

    The results of such a copy also name its source.
    """
    fetched = instruction.shapes[1 if instruction.opcode == "slice-start" else 0]
    return fetched.bytes * ((source.space == 0) + (fetched.space == 0))


def _traffic(
    instruction: Instruction, own: dict[str, Instruction], *, main_memory: bool = False
) -> float:
    """Bytes of inputs and results; where a slice is cut out or put in, only the slice counts."""

    def total(shapes: tuple[Shape, ...]) -> float:
        return sum(s.bytes for s in shapes if not main_memory or s.space == 0)

    results = total(instruction.shapes)
    inputs = [total(own[o].shapes) for o in instruction.operands if o in own]

    # A slice is read and written once; the array that it is cut from or put into stays in place.
    if "dynamic-slice" in instruction.name or "dynamic_slice" in instruction.op_name:
        return 2 * results
    if "dynamic-update-slice" in instruction.name or "dynamic_update_slice" in instruction.op_name:
        return 2 * (sum(inputs) - max(inputs, default=0.0))
    return results + sum(inputs)


def _product_flops(instruction: Instruction, own: dict[str, Instruction]) -> float:
    """FLOPs of a matrix product or convolution; 0 if its operands are not in this computation."""
    if len(instruction.operands) < 2 or any(o not in own for o in instruction.operands[:2]):
        return 0.0

    # 2 FLOPs for each element of the result and each element that is summed over.
    out = math.prod(instruction.shapes[0].dims)
    left, right = (own[o].shapes[0].dims for o in instruction.operands[:2])
    if instruction.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
        contracted = [left[int(a)] for a in axes[1].split(",") if a] if axes else []
        return 2.0 * out * math.prod(contracted)
    return _convolution_flops(instruction, left, right)


def _convolution_flops(
    instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]
) -> float:
    """FLOPs as XLA counts them: window places on padding, or between dilated inputs, cost nothing.

    A TPU's compiler writes a batched product as a convolution over the batch, whose window has one such
    place for each output and as many others as there are examples.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text)
    if not labels:
        return 0.0

    # The window's settings, and the size of each labeled dimension.
    given = re.search(r"window=\{(.*?)\}", instruction.text)
    window = dict(part.split("=") for part in given[1].split()) if given else {}
    sizes = zip(labels.groups(), (left, right, instruction.shapes[0].dims), strict=True)
    image, kernel, out = (dict(zip(names, dims, strict=True)) for names, dims in sizes)

    # Count the window places that meet data, axis by axis.
    places = 1
    for axis, label in enumerate(sorted(x for x in out if x.isdigit())):
        low = int(_of_axis(window, "pad", axis, "0_0").split("_")[0])
        stride, dilation, spread = (
            int(_of_axis(window, key, axis, "1")) for key in ("stride", "rhs_dilate", "lhs_dilate")
        )
        starts = np.arange(out[label])[:, None] * stride - low
        at = starts + np.arange(kernel.get(label, 1))[None] * dilation
        places *= int(((at >= 0) & (at % spread == 0) & (at // spread < image[label])).sum())
    return 2.0 * out["b"] * out["f"] * kernel["i"] * places


def _of_axis(window: dict[str, str], key: str, axis: int, default: str) -> str:
    """What a window says of a spatial axis, as in `pad=1_1x0_0`."""
    return window[key].split("x")[axis] if key in window else default
