# SPDX-License-Identifier: Apache-2.0
"""The implementations behind `models.attention.attention`; all of them compute the same function.

Shapes everywhere: q [b, l, heads, d], k and v [b, m, heads, d], mask [b, m] with False at padding.
This module alone knows where each kernel may be used: `unfit` decides about devices, and a kernel's own
function about shapes; it hands what it cannot take to a portable implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from digseg_jax.arraytypes import Array, Bool, Float
from digseg_jax.models.kernels import cross_attention
from digseg_jax.models.remat import KEPT

AttentionFn = Callable[[Array, Array, Array, Array | None], Array]

QUERY_CHUNK = 256  # queries at a time; on two CPU cores faster than 64 and 1024
FEW_KEYS = 128  # keys; with no more, as in a text, the weights are small and chunks do not pay
HEADWISE_CHUNK = 1 << 21  # weights at a time on a CPU: 8 MB
HEADWISE_FEW = 1 << 19  # weights of a head; with fewer, separate calls cost more than they save
LANES = 128  # splash blocks are multiples of a TPU register's lanes
# cuDNN's fused attention: most channels per head on every GPU, the multiple of queries and keys that
# its backward pass takes in every version, and the first generation of GPUs that it runs on.
CUDNN_MAX_WIDTH = 128
CUDNN_BLOCK = 64
CUDNN_CAPABILITY = (8, 0)  # Ampere
PLATFORMS = {"splash": ("tpu",), "cudnn": ("gpu", "cuda"), "headwise": ("cpu",)}  # others run anywhere


def unfit(name: str, device: Any, dtype: str) -> str:
    """Says why a device cannot run an implementation with activations of `dtype`; "" if it can.

    device: a `jax.Device`, or an object that describes one: it has `platform` and, for a GPU,
      `compute_capability`.
    """
    platform = device.platform
    platforms = PLATFORMS.get(name, (platform,))
    if platform not in platforms:
        return f"runs on {platforms[0].upper()}s only, the devices here are of platform {platform!r}"
    if name != "cudnn":
        return ""

    # cuDNN also needs 16-bit activations and a recent GPU.
    if jnp.dtype(dtype).itemsize != 2:
        return f"takes 16-bit activations only, config.model.dtype is {dtype!r}"
    capability = getattr(device, "compute_capability", None) or "8.0"
    numbers = capability.split(".")
    if not all(number.isdecimal() for number in numbers):  # AMD's have names, such as gfx942
        return f"runs on NVIDIA's GPUs only, the devices here are of the kind {capability!r}"
    if tuple(map(int, numbers)) < CUDNN_CAPABILITY:
        return f"needs a GPU of compute capability 8.0 or later, those here have {capability}"
    return ""


def plain(
    q: Float[Array, "b l heads d"],
    k: Float[Array, "b m heads d"],
    v: Float[Array, "b m heads d"],
    mask: Bool[Array, "b m"] | None = None,
) -> Float[Array, "b l heads d"]:
    """Computes attention as two matrix products around a softmax; holds l x m weights per head."""
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    return _attend(q, k, v, mask).swapaxes(1, 2)


def _attend(
    q: Float[Array, "b heads l d"],
    k: Float[Array, "b heads m d"],
    v: Float[Array, "b heads m d"],
    mask: Bool[Array, "b m"] | None,
) -> Float[Array, "b heads l d"]:
    """Attention with the heads before the positions, the core of all portable implementations."""
    # Heads before positions: products of contiguous blocks, on a CPU twice as fast as strided ones.
    # Scaling the queries is cheaper than scaling the logits, but 16 bits would round them once more.
    scale = q.shape[-1] ** -0.5
    early = q.dtype == jnp.float32
    q = q * scale if early else q
    logits = jnp.einsum("bhld,bhmd->bhlm", q, k, preferred_element_type=jnp.float32)
    logits = logits if early else logits * scale

    if mask is not None:
        logits = jnp.where(mask[:, None, None, :], logits, jnp.finfo(jnp.float32).min)

    # Any shift leaves the softmax as it is, so the maximum needs no gradient.
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    out = jnp.einsum("bhlm,bhmd->bhld", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)

    # Divided here rather than in the weights, which are many more numbers.
    return (out / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)


def chunked(
    q: Float[Array, "b l heads d"],
    k: Float[Array, "b m heads d"],
    v: Float[Array, "b m heads d"],
    mask: Bool[Array, "b m"] | None = None,
) -> Float[Array, "b l heads d"]:
    """Computes `plain` on at most 256 queries at a time; the backward pass recomputes each chunk.

    Memory is bounded by chunk x keys rather than queries x keys, on every platform. With few keys, such
    as a text's, the weights are no larger than an activation, and a single product is faster.
    """
    b, length, heads, d = q.shape
    count = -(-length // QUERY_CHUNK)
    if count <= 1 or k.shape[1] <= FEW_KEYS:
        return plain(q, k, v, mask)

    # Pad to equal chunks, with the chunks as the leading axis.
    size = -(-length // count)
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    q = jnp.pad(q, ((0, 0), (0, 0), (0, count * size - length), (0, 0)))
    chunks = q.reshape(b, heads, count, size, d).transpose(2, 0, 1, 3, 4)

    # One chunk after another; then back into one sequence, without the padding.
    out = jax.lax.map(jax.checkpoint(lambda chunk: _attend(chunk, k, v, mask)), chunks)
    out = out.transpose(1, 2, 0, 3, 4).reshape(b, heads, count * size, d)
    return out[:, :, :length].swapaxes(1, 2)


def headwise(
    q: Float[Array, "b l heads d"],
    k: Float[Array, "b m heads d"],
    v: Float[Array, "b m heads d"],
    mask: Bool[Array, "b m"] | None = None,
) -> Float[Array, "b l heads d"]:
    """Computes `plain` for one head of one example at a time, some queries at a time; for CPUs.

    The weights of a chunk stay in a processor's cache, which is twice as fast as all of them through
    main memory. The backward pass recomputes each chunk. With few weights this is `plain`.
    """
    b, length, heads, d = q.shape
    keys = k.shape[1]
    if length * keys < HEADWISE_FEW:
        return plain(q, k, v, mask)

    # The fewest equal chunks that fit into the cache.
    least = -(-length * keys // HEADWISE_CHUNK)
    count = next((n for n in range(least, 2 * least + 1) if length % n == 0), None)
    if count is None:  # no such number divides the length: a feature map with odd sides
        return chunked(q, k, v, mask)

    @jax.checkpoint
    def attend(*arrays: Array) -> Array:
        """Attention of some queries of one head, [l, d], with all its keys."""
        q, k, v, *mask = (array[None] for array in arrays)
        return _attend(q[None], k[None], v[None], *(mask or (None,)))[0, 0]

    def of_head(arrays: tuple[Array, ...]) -> Array:
        """Attention of one head, its chunks of queries one after another."""
        chunks, *others = arrays
        return jax.lax.map(lambda chunk: attend(chunk, *others), chunks)

    # Examples and heads become one axis, to loop over.
    q, k, v = (a.swapaxes(1, 2).reshape(b * heads, -1, d) for a in (q, k, v))
    chunks = q.reshape(b * heads, count, length // count, d)
    masks = () if mask is None else (jnp.repeat(mask, heads, axis=0),)
    out = jax.lax.map(of_head, (chunks, k, v, *masks))
    return out.reshape(b, heads, length, d).swapaxes(1, 2)


def splash(
    q: Float[Array, "b l heads d"],
    k: Float[Array, "b m heads d"],
    v: Float[Array, "b m heads d"],
    mask: Bool[Array, "b m"] | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "b l heads d"]:
    """Runs Pallas kernels for TPUs; `chunked` where their blocks do not fit.

    JAX's splash attention computes the U-Net's self-attention: both lengths multiples of 128, no key
    masked. The few keys of a text go to `kernels.cross_attention`. XLA cannot partition a Pallas
    kernel, so on several devices this has to be called on each device's shard
    (`partition.LocalAttention`).

    Args:
      interpret: run the kernel's semantics on any platform, slowly; for tests.
    """
    heads, length, keys = q.shape[2], q.shape[1], k.shape[1]
    if cross_attention.takes(length, keys):
        return cross_attention.few_keys(q, k, v, mask, interpret=interpret)
    if mask is not None or length % LANES or keys % LANES:
        return chunked(q, k, v, mask)

    # The kernel does not scale, and takes one example with the heads first.
    kernel = _splash_kernel(heads, length, keys, interpret)
    q = (q * q.shape[-1] ** -0.5).astype(q.dtype)
    out = jax.vmap(kernel)(*(a.swapaxes(1, 2) for a in (q, k, v)))
    return out.swapaxes(1, 2).astype(v.dtype)


def _splash_kernel(heads: int, length: int, keys: int, interpret: bool) -> Callable[..., Array]:
    """JAX's splash attention without a mask, for arrays [heads, length, d]."""
    # Imported here: Pallas' TPU part is useless elsewhere and costs start-up time.
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    block_q, block_kv = _block(length), _block(keys)
    sizes = library.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )

    # The results get the name KEPT, so that rematerialized blocks keep them.
    masks = [library.FullMask((length, keys))] * heads
    return library.make_splash_mha(
        library.splash_attention_mask.MultiHeadMask(masks),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )


def _block(length: int) -> int:
    """Largest block size that divides a multiple of 128."""
    return next(size for size in (512, 384, 256, LANES) if length % size == 0)


def cudnn(
    q: Float[Array, "b l heads d"],
    k: Float[Array, "b m heads d"],
    v: Float[Array, "b m heads d"],
    mask: Bool[Array, "b m"] | None = None,
) -> Float[Array, "b l heads d"]:
    """Runs cuDNN's fused attention on NVIDIA GPUs; `chunked` where it cannot run or does not pay.

    It computes the self-attention of feature maps. A text has few keys, an odd number of them and a
    mask, which cuDNN's backward pass rejects; wider heads occur in small maps and in the autoencoder.
    """
    if not _cudnn_takes(q, k, mask):
        return chunked(q, k, v, mask)
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def _cudnn_takes(q: Array, k: Array, mask: Array | None) -> bool:
    """True if cuDNN computes it forward and backward on every GPU that `unfit` accepts."""
    (_, length, _, width), keys = q.shape, k.shape[1]
    if mask is not None or keys <= FEW_KEYS or q.dtype.itemsize != 2:
        return False

    blocks = length % CUDNN_BLOCK == 0 and keys % CUDNN_BLOCK == 0
    return blocks and width <= CUDNN_MAX_WIDTH and width % 8 == 0


IMPLEMENTATIONS: dict[str, AttentionFn] = {
    "plain": plain,
    "chunked": chunked,
    "headwise": headwise,
    "splash": splash,
    "cudnn": cudnn,
}
