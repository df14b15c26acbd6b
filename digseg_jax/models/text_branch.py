# SPDX-License-Identifier: Apache-2.0
"""The U-Net's text parameters that Stable Diffusion lacks, and their initial values.

Text enters through adapters before the cross-attention (`models.text_adapters`), through a second
cross-attention beside it (`models.attention.ParallelAttention`), or both. Its tokens may be marked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from digseg_jax import trees
from digseg_jax.arraytypes import Array, Float, Params
from digseg_jax.models.unet import UNetConfig

# Regexes on parameter paths. The prompt's values come from a text encoder, all others are new.
ADAPTERS = r"^text_adapters\."
BRANCH = r"\.attn2\.(text\.|scale$)"
PROMPT = r"\.attn2\.prompt\."
MARKS = r"^mark_embedding\."

# Parameters that start at zero: an adapter between equal widths then starts as the identity, and the
# second attention adds nothing.
ZERO_INIT = r"text_adapters\.\d+\.fc2\.kernel$|\.attn2\.text\.to_out\.0\.kernel$"


def lacking(stored: UNetConfig, wanted: UNetConfig) -> tuple[str, ...]:
    """Regexes of the paths of new parameters: those of `wanted` that a checkpoint of `stored` lacks.

    Adapters and marks of text tokens of another width count as lacking.
    """
    adapters = stored.text_adapters and stored.text_width == wanted.text_width
    found = []
    if wanted.text_adapters and not adapters:
        found.append(ADAPTERS)
    if wanted.prompt_length and not stored.prompt_length:
        found.append(BRANCH)
    marks = stored.mark_width == wanted.mark_width and stored.text_width == wanted.text_width
    if wanted.mark_width and not marks:
        found.append(MARKS)
    return tuple(found)


def start_branch(params: Params, prompts: Sequence[Float[Array, "m d"]]) -> Params:
    """Initializes the second attentions: they add nothing yet, but their gradients are useful.

    Each gets the prompt of its level, and the first attention's projections of queries, keys and values
    where the widths agree. Its output projection stays as it is: at zero.

    Args:
      params: of a U-Net with `prompt_length`, on the host.
      prompts: tokens of the prompt as the cross-attention reads them, the highest resolution first.
    """
    flat = dict(trees.flatten(params))
    for path, value in flat.items():
        if re.search(PROMPT, path):
            flat[path] = np.asarray(prompts[_level(path, len(prompts))], np.float32)
            assert flat[path].shape == value.shape, path

        # IP-Adapter starts in the same way.
        first = flat.get(re.sub(r"\.attn2\.text\.(to_[qkv])\.", r".attn2.\1.", path))
        if first is not None and first.shape == value.shape:
            flat[path] = first
    return trees.unflatten(flat)


def _level(path: str, levels: int) -> int:
    """The resolution level of a block's parameter, 0 for the highest."""
    # down_blocks.0 is the highest level, up_blocks.0 the lowest, as is the block between them.
    block, index = path.split(".")[:2]
    if block == "down_blocks":
        return int(index)
    return levels - 1 - (int(index) if block == "up_blocks" else 0)
