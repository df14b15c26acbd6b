# SPDX-License-Identifier: Apache-2.0
"""Two-way map between parameter paths in this program and keys on the hub.

They differ only in the last name and in the layout of a kernel:

    kernel [h,w,in,out]  <->  weight [out,in,h,w]      embedding  <->  weight
    kernel [in,out]      <->  weight [out,in]          scale      <->  weight      bias <-> bias

A leaf of any other name keeps name and layout. `KeyRules` undoes the spellings of old checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import numpy as np

from digseg_jax.errors import UserError, nearest

_TO_HUB = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
_SHOWN = 3  # keys of each kind that an error lists

Shape = tuple[int, ...]


@dataclass(frozen=True)
class KeyRules:
    """Rules for the spellings of one model family's keys.

    Attributes:
        renames: (pattern, replacement) pairs for `re.sub`, applied in order to every hub key.
        ignored: patterns searched for in the renamed key; a match is not a parameter of the model.
    """

    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()

    def rename(self, key: str) -> str:
        """The current spelling of a key."""
        for pattern, replacement in self.renames:
            key = re.sub(pattern, replacement, key)
        return key

    def ignores(self, key: str) -> bool:
        """True if the (renamed) key is a buffer or a head that the model does not have."""
        return any(re.search(pattern, key) for pattern in self.ignored)


# "gamma" and "beta" are TensorFlow's names in the first converted checkpoints.
BERT_RULES = KeyRules(
    renames=(
        (r"^bert\.", ""),
        (r"LayerNorm\.gamma$", "LayerNorm.weight"),
        (r"LayerNorm\.beta$", "LayerNorm.bias"),
    ),
    ignored=(r"(^|\.)(position_ids|token_type_ids)$", r"^cls\."),
)
# Old names of the attention layers, from before diffusers had one class for all attention.
VAE_RULES = KeyRules(
    renames=(
        (r"(attentions\.\d+)\.query\.", r"\1.to_q."),
        (r"(attentions\.\d+)\.key\.", r"\1.to_k."),
        (r"(attentions\.\d+)\.value\.", r"\1.to_v."),
        (r"(attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
    ),
)
UNET_RULES = KeyRules()
_POSITIONS = r"(^|\.)position_ids$"  # a buffer that transformers once stored
# A whole CLIPModel is read as one of its encoders; transformers 5 drops the text encoder's prefix.
CLIP_TEXT_RULES = KeyRules(
    renames=((r"^text_model\.", ""),),
    ignored=(_POSITIONS, r"^vision_model\.", r"^(text|visual)_projection\.", r"^logit_scale$"),
)
CLIP_TEXT_PROJECTION_RULES = KeyRules(
    ignored=(_POSITIONS, r"^vision_model\.", r"^visual_projection\.", r"^logit_scale$")
)
CLIP_VISION_RULES = KeyRules(
    ignored=(_POSITIONS, r"^text_model\.", r"^text_projection\.", r"^logit_scale$")
)
OPEN_CLIP_RULES = KeyRules(
    renames=((r"^text\.", ""),),
    # Some of open_clip's checkpoints keep BERT's pooler although they pool in another way.
    ignored=(_POSITIONS, r"^visual\.", r"^logit_(scale|bias)$", r"^transformer\.pooler\."),
)


def hub_key(path: str) -> str:
    """The hub's key for a path: `a.0.kernel` -> `a.0.weight`."""
    parent, _, leaf = path.rpartition(".")
    name = _TO_HUB.get(leaf, leaf)
    return f"{parent}.{name}" if parent else name


def to_hub(path: str, leaf: np.ndarray) -> np.ndarray:
    """Converts a leaf to the hub's layout.

    Raises:
      ValueError: a kernel of neither 2 nor 4 axes.
    """
    if path.rpartition(".")[2] != "kernel":
        return leaf
    if leaf.ndim == 4:
        return leaf.transpose(3, 2, 0, 1)
    if leaf.ndim == 2:
        return leaf.T
    raise ValueError(f"no hub layout for {path} of rank {leaf.ndim}")


def from_hub(path: str, tensor: np.ndarray, shape: Shape) -> np.ndarray:
    """Converts a hub tensor to this program's layout and `shape`, for which `fits` must be true."""
    if path.rpartition(".")[2] != "kernel":
        return tensor

    # A linear layer may be stored as a 1x1 convolution.
    out_in = tensor.reshape(hub_shape(path, shape))
    return out_in.transpose(2, 3, 1, 0) if len(shape) == 4 else out_in.T


def hub_shape(path: str, shape: Shape) -> Shape:
    """The hub's shape for a leaf of `shape`."""
    if path.rpartition(".")[2] != "kernel":
        return tuple(shape)

    # Convolutions have four axes, linear layers two.
    if len(shape) == 4:
        h, w, cin, cout = shape
        return (cout, cin, h, w)
    return tuple(shape[::-1])


def fits(path: str, stored: Shape, shape: Shape) -> bool:
    """True if a hub tensor of shape `stored` can fill a leaf of `shape`.

    A linear layer [o, i] and a 1x1 convolution [o, i, 1, 1] fit each other.
    """
    wanted = hub_shape(path, shape)
    if tuple(stored) == wanted:
        return True

    # [o, i] against [o, i, 1, 1]: the sizes must agree and the rest be ones.
    linear = {len(stored), len(wanted)} == {2, 4}
    return linear and tuple(stored[:2]) == wanted[:2] and prod(stored) == prod(wanted)


@dataclass
class _Faults:
    """Keys that do not pair up, by kind of fault; each entry is shown to the user."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    misshaped: list[str] = field(default_factory=list)


def match(
    shapes: Mapping[str, Shape],
    stored: Mapping[str, Shape],
    rules: KeyRules,
    source: str,
) -> dict[str, str]:
    """Pairs each path of the model with exactly one hub key.

    Args:
        shapes: path -> shape in the model.
        stored: hub key -> stored shape.
        rules: the model family's spellings.
        source: file or folder, for the error.

    Returns:
        hub key as stored -> path.

    Raises:
        UserError: lists missing, unexpected, doubled and misshaped keys.
    """
    pairs, faults = _pair(shapes, stored, rules)

    # A path without a key is a fault too.
    found = set(pairs.values())
    faults.missing = [hub_key(path) for path in shapes if path not in found]

    if any(vars(faults).values()):
        known = [hub_key(path) for path in shapes]
        raise UserError(f"{source} does not fit the model: {_report(faults, known)}")
    return pairs


def _pair(
    shapes: Mapping[str, Shape], stored: Mapping[str, Shape], rules: KeyRules
) -> tuple[dict[str, str], _Faults]:
    """Pairs stored keys with paths, and collects all faults but missing keys."""
    by_key = {hub_key(path): path for path in shapes}
    pairs: dict[str, str] = {}
    first: dict[str, str] = {}  # path -> the stored key that took it
    faults = _Faults()

    for key, shape in stored.items():
        name = rules.rename(key)
        path = by_key.get(name)

        if path is None:
            if not rules.ignores(name):
                faults.unexpected.append(key)
        elif path in first:
            faults.doubled.append(f"{first[path]} and {key}")  # two spellings of one key
        else:
            first[path], pairs[key] = key, path
            if not fits(path, shape, shapes[path]):
                wanted = list(hub_shape(path, shapes[path]))
                faults.misshaped.append(f"{key} is {list(shape)}, the model wants {wanted}")
    return pairs, faults


def _report(faults: _Faults, known: list[str]) -> str:
    """Reports the faults in one line; similar missing and unexpected keys are shown together."""
    # A missing and an unexpected key that look alike are most likely one key, spelled in two ways.
    missing = [m + nearest(m, faults.unexpected, n=1) for m in faults.missing[:_SHOWN]]

    # Suggest each pair once: if a key is missing, the line above has paired the two already.
    ours = [] if faults.missing else known
    unexpected = [u + nearest(u, ours, n=1) for u in faults.unexpected[:_SHOWN]]

    parts = [
        _part("missing", faults.missing, missing),
        _part("unexpected", faults.unexpected, unexpected),
        _part("stored twice", faults.doubled, faults.doubled[:_SHOWN]),
        _part("of the wrong shape", faults.misshaped, faults.misshaped[:_SHOWN]),
    ]
    return " | ".join(part for part in parts if part)


def _part(title: str, items: list[str], shown: list[str]) -> str:
    """`2 missing: a, b` for one kind of fault; "" if there are none."""
    if not items:
        return ""
    more = f", and {len(items) - len(shown)} more" if len(items) > len(shown) else ""
    return f"{len(items)} {title}: {', '.join(shown)}{more}"
