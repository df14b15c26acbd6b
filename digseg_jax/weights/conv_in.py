# SPDX-License-Identifier: Apache-2.0
"""Widens a text-to-image U-Net's first convolution to take [image latent, noisy mask latent].

Source: Marigold, `marigold_depth_trainer.py:_replace_unet_conv_in`: the kernel is repeated along its
inputs and halved, so that the activations keep their scale when both halves see similar inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from digseg_jax.arraytypes import Array, DTypeLike, Params
from digseg_jax.errors import UserError
from digseg_jax.models import functional
from digseg_jax.weights.load import Shardings, load_params, open_component
from digseg_jax.weights.safetensors_io import CONFIG_FILE, TensorInfo

_CLASS = "UNet2DConditionModel"
# Config fields in which a checkpoint may differ from the model that it initializes. The heads
# are compared as numbers per level instead, since one number and a list of it mean the same.
_FREE_FIELDS = (
    "in_channels",
    "sample_size",
    "text_adapters",
    "text_dim",
    "mark_width",
    "attention_head_dim",
    "num_attention_heads",
)


def widen_conv_in(params: Params, old: int = 4, new: int = 8) -> Params:
    """Repeats conv_in's kernel [h,w,old,c] to [h,w,new,c] and scales it by old / new; keeps the bias.

    Raises:
      UserError: the kernel does not have `old` inputs, or `new` is not a multiple of `old`.
    """
    kernel = _conv_in_kernel(params, old)
    if new % old:
        raise UserError(f"conv_in: {new} inputs are not a multiple of {old}")

    # The image's latents first, then the mask's: each group starts with the same kernel.
    wide = jnp.concatenate([kernel] * (new // old), axis=2) * (old / new)
    return _with_kernel(params, wide)


def narrow_conv_in(params: Params, old: int = 8, new: int = 4) -> Params:
    """Sums conv_in's groups of inputs, [h,w,old,c] to [h,w,new,c].

    Undoes `widen_conv_in` exactly if the factor is a power of two.

    Raises:
      UserError: the kernel does not have `old` inputs, or `old` is not a multiple of `new`.
    """
    kernel = _conv_in_kernel(params, old)
    if old % new:
        raise UserError(f"conv_in: {old} inputs are not a multiple of {new}")

    # Input i and input i + new see the same channel, so the groups are the slower axis.
    h, w, _, c = kernel.shape
    return _with_kernel(params, kernel.reshape(h, w, old // new, new, c).sum(axis=2))


def load_unet_params(
    path_or_hub_id: str | Path,
    config: Any,
    *,
    subfolder: str = "",
    param_dtype: DTypeLike = jnp.float32,
    shardings: Shardings | None = None,
) -> Params:
    """Loads a U-Net's parameters from a checkpoint with as many inputs as `config`, or half as many.

    With half as many, the first kernel is widened (`widen_conv_in`). The other arguments are those of
    `load_params`.

    Raises:
        UserError: another number of inputs, a configuration that computes something else than the
          checkpoint's, or what `load_params` raises.
    """
    # Check before the weights are read. A wrong number of heads would not show in any shape.
    _, values, infos, folder = open_component(path_or_hub_id, subfolder, (_CLASS,))
    stored = _stored_inputs(infos, folder)
    if config.in_channels not in (stored, 2 * stored):
        raise UserError(
            f"{folder}: conv_in has {stored} inputs, the config has in_channels="
            f"{config.in_channels}; legal: {stored}, or {2 * stored} by widening"
        )
    _check_same_computation(values, config, folder)

    # Load at the stored width.
    narrow = dataclasses.replace(config, in_channels=stored)
    params = load_params(
        folder,
        _abstract_unet(narrow),
        param_dtype=param_dtype,
        expect=_CLASS,
        shardings=shardings,
    )

    if stored == config.in_channels:
        return params
    return widen_conv_in(params, stored, config.in_channels)


def _abstract_unet(config: Any) -> Params:
    """Shapes of a U-Net's parameters, without allocating any."""
    from digseg_jax.models.unet import UNet2DConditionModel

    return functional.abstract(lambda: UNet2DConditionModel(config, rngs=functional.FixedRngs()))[1]


def _stored_inputs(infos: Mapping[str, TensorInfo], folder: Path) -> int:
    """Number of inputs of the stored first convolution, read without loading a tensor."""
    if "conv_in.weight" not in infos:
        raise UserError(f"{folder} holds no U-Net: no key 'conv_in.weight'")
    # The hub's layout: [out, in, h, w].
    return infos["conv_in.weight"].shape[1]


def _check_same_computation(values: Mapping[str, Any], config: Any, folder: Path) -> None:
    """Raises UserError if a field of config.json that changes the computation is not the model's."""
    stored = type(config).from_dict(values)

    # Fields that config.json does not have are not compared.
    names = [f.name for f in dataclasses.fields(config) if f.name in values]
    for name in ["heads", *(n for n in names if n not in _FREE_FIELDS)]:
        ours, theirs = getattr(config, name), getattr(stored, name)
        if ours != theirs:
            source = folder if folder.is_file() else folder / CONFIG_FILE
            raise UserError(f"{source}: {name}={theirs!r}; the model has {ours!r}")


def _conv_in_kernel(params: Params, inputs: int) -> Array:
    """The first convolution's kernel [h, w, in, out]; raises UserError for another number of inputs."""
    kernel = params["conv_in"]["kernel"]
    if kernel.shape[2] != inputs:
        raise UserError(f"conv_in: the kernel has {kernel.shape[2]} inputs, expected {inputs}")
    return kernel


def _with_kernel(params: Params, kernel: Array) -> Params:
    """A copy of the tree with another first kernel; all other leaves are shared."""
    return {**params, "conv_in": {**params["conv_in"], "kernel": kernel}}
