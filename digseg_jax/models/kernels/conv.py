# SPDX-License-Identifier: Apache-2.0
"""Fast convolutions for CPUs: stride 1, float32, as matrix products where that pays.

XLA's own convolution on CPUs gathers a patch for each cell and multiplies. Faster than that, on one
AVX-512 processor: Winograd's products on large maps of many channels (1.2 to 1.8 times), all patches
gathered at once on maps smaller than their kernels, where XLA reads the kernel too often (1.1 to 3
times), the gradient of a wide kernel as one product a tap (up to 3), a 1x1 convolution (up to 4).
`python -m tests.bench models` times whole networks either way.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np

from digseg_jax.arraytypes import Array, Float

Padding = tuple[tuple[int, int], tuple[int, int]]  # ((top, bottom), (left, right))
SAME = ((1, 1), (1, 1))  # keeps the size with a 3x3 kernel

# F(4, 3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2015), section 4.3:
# four neighbors of a row from six products instead of twelve.
TILE = 4
INPUT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
KERNEL = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))

WIDE = 192  # channels; with fewer, XLA's convolution is as fast as anything here
MANY = 2048  # cells; with fewer, Winograd's sums cost more than its products save


def conv(
    x: Float[Array, "b h w c"], kernel: Float[Array, "i j c d"], padding: Padding
) -> Float[Array, "b h2 w2 d"]:
    """Convolves with stride 1; equal to XLA's convolution up to rounding, some 1e-6 of the result."""
    if kernel.shape[:2] == (1, 1) and padding == ((0, 0), (0, 0)):
        return x @ kernel[0, 0]
    if min(kernel.shape[2:]) < WIDE:
        return xla_conv(x, kernel, padding)
    return _wide_conv(x, kernel, padding)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _wide_conv(x: Array, kernel: Array, padding: Padding) -> Array:
    """Convolves with a kernel of many channels in the fastest way for the map's size."""
    if _smaller_than_kernel(x, kernel):
        return patches_conv(x, kernel, padding)

    # Winograd: rows of whole tiles, and so many cells that the saved products pay for the sums.
    same = kernel.shape[:2] == (3, 3) and padding == SAME
    if same and x.shape[2] % TILE == 0 and _cells(x) >= MANY:
        return winograd_conv(x, kernel)
    return xla_conv(x, kernel, padding)


def _forward(x: Array, kernel: Array, padding: Padding) -> tuple[Array, tuple[Array, Array]]:
    return _wide_conv(x, kernel, padding), (x, kernel)


def _backward(padding: Padding, saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    """Gradients of x and the kernel; a map smaller than its kernel has all patches at once here too."""
    x, kernel = saved
    if _smaller_than_kernel(x, kernel):
        return jax.vjp(partial(patches_conv, padding=padding), x, kernel)[1](cotangent)

    # The gradient of x is the convolution with the mirrored kernel and the opposite padding.
    i, j, *_ = kernel.shape
    (top, bottom), (left, right) = padding
    opposite = ((i - 1 - top, i - 1 - bottom), (j - 1 - left, j - 1 - right))
    towards_x = _wide_conv(cotangent, jnp.flip(kernel, (0, 1)).swapaxes(2, 3), opposite)
    return towards_x, _kernel_gradient(x, cotangent, (i, j), padding)


_wide_conv.defvjp(_forward, _backward)


def _cells(x: Array) -> int:
    """Number of cells of all maps, b * h * w."""
    return math.prod(x.shape[:3])


def _smaller_than_kernel(x: Array, kernel: Array) -> bool:
    """True if there are fewer cells than channels: XLA would read the kernel too often."""
    return _cells(x) <= min(kernel.shape[2:])


def xla_conv(x: Array, kernel: Array, padding: Padding, stride: int = 1) -> Array:
    """Plain `lax.conv_general_dilated`, the reference implementation."""
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def patches_conv(x: Array, kernel: Array, padding: Padding) -> Array:
    """Gathers each cell's patch, then multiplies all patches in one matrix product."""
    i, j, c, d = kernel.shape
    columns = jnp.concatenate(_shifted(x, (i, j), padding), axis=-1)  # b h w i*j*c
    return columns @ kernel.reshape(i * j * c, d)


def winograd_conv(x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c d"]) -> Array:
    """Convolves with zero padding 1 and half the products: Winograd along rows, plain along columns.

    Raises:
      TypeError: w is not a multiple of 4 (from the reshape).
    """
    b, h, w, c = x.shape

    # Six neighbors in a row for every tile of four results; the last two come from the next tile.
    tiles = w // TILE
    padded = jnp.pad(x, ((0, 0), (0, 0), (1, TILE - 1), (0, 0))).reshape(b, h, tiles + 1, TILE, c)
    cells = [padded[:, :, :tiles, i] for i in range(TILE)]
    cells += [padded[:, :, 1:, i] for i in range(len(INPUT) - TILE)]

    # One plain convolution along the columns for each of the six products.
    products = []
    for inputs, taps in zip(INPUT, KERNEL, strict=True):
        column = _combine(taps, [kernel[:, j] for j in range(3)])  # 3 c d
        products.append(xla_conv(_combine(inputs, cells), column[:, None], ((1, 1), (0, 0))))

    # Back from six products to four neighbors of each tile.
    outputs = [_combine(row, products) for row in OUTPUT]
    return jnp.stack(outputs, axis=3).reshape(b, h, w, -1)


def _combine(factors: Sequence[float], terms: Sequence[Array]) -> Array:
    """Sums terms times factors, most of which are 0 or 1."""
    # Zeros need no term, ones no product.
    parts = [
        term if factor == 1 else np.float32(factor) * term
        for factor, term in zip(factors, terms, strict=True)
        if factor
    ]
    return reduce(operator.add, parts)


def _kernel_gradient(x: Array, cotangent: Array, size: tuple[int, int], padding: Padding) -> Array:
    """Gradient of the kernel, as one matrix product for each tap."""
    c, d = x.shape[-1], cotangent.shape[-1]
    columns = cotangent.reshape(-1, d)
    taps = [shifted.reshape(-1, c).T @ columns for shifted in _shifted(x, size, padding)]
    return jnp.stack(taps).reshape(*size, c, d)


def _shifted(x: Array, size: tuple[int, int], padding: Padding) -> list[Array]:
    """Inputs of each tap of a kernel, [b, h2, w2, c] each, in the kernel's order."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    h, w = x.shape[1] - size[0] + 1, x.shape[2] - size[1] + 1
    return [x[:, i : i + h, j : j + w] for i in range(size[0]) for j in range(size[1])]
