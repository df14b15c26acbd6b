# SPDX-License-Identifier: Apache-2.0
"""Keys of earlier versions: what they are called now, or which constant took their place.

What an earlier version wrote down, a run's config.json or an export's segmenter.json, is read through
`with_current_names`; `hint` is for keys that somebody types from memory.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from digseg_jax.config.schema import is_free

MOVED = {
    "data.workers": "loading.workers",
    "data.on_error": "loading.on_error",
    "data.train_split": "data.split",
    "model.conv": "compute.conv",
    "model.attention": "compute.attention",
    "model.feed_forward": "compute.feed_forward",
    "model.remat": "compute.remat",
    "model.vae_limit": "compute.vae_batch",
    "model.unet_limit": "compute.unet_batch",
    "model.vae_arch": "vae_arch",
    "model.unet_arch": "unet_arch",
    "diffusion.mask_loss_weight": "loss.mask_weight",
    "diffusion.mask_loss_from": "loss.mask_from",
    "segmentation.codec": "model.codec",
    "train.log_every": "logging.every",
    "train.eval_every": "logging.eval_every",
    "train.profile": "logging.profile",
    "train.wandb": "logging.wandb",
    "train.log_examples": "logging.examples",
    "train.accumulation": "compute.accumulation",
    "train.compile_cache": "compute.compile_cache",
}

# Settings that are constants now, with the value that every run has.
CONSTANT = {
    "diffusion.num_train_timesteps": 1000,
    "diffusion.beta_start": 0.00085,
    "diffusion.beta_end": 0.012,
    "diffusion.high_noise_a": 0.1,
    "diffusion.multires_strength": 0.9,
    "optim.b1": 0.9,
    "checkpoint.overlap": 1,
    "eval.gallery": 24,
}

_ABSENT = object()


def with_current_names(values: dict[str, Any]) -> dict[str, Any]:
    """The sections of a stored configuration, with every key under its current name.

    A key that became a constant is left out, unless it changed the training and has another value:
    `parse` then rejects it by its name.
    """
    found = copy.deepcopy(values)
    for old, new in MOVED.items():
        value = _taken(found, old)
        if value is not _ABSENT:
            _put(found, new, value)

    for old, constant in CONSTANT.items():
        value = _taken(found, old)
        if value is not _ABSENT and value != constant and not is_free(old):
            _put(found, old, value)
    return found


def hint(key: str) -> str:
    """What became of a key that is unknown now, as the sentence of an error; "" if it never was one.

    key: dotted, such as "train.log_every", or a section such as "segmentation".
    """
    for old, new in MOVED.items():
        if key == old or key.startswith(f"{old}."):
            return f"config.{key} is now config.{new}{key.removeprefix(old)}"
        if old.startswith(f"{key}."):
            return f"config.{old} is now config.{new}"
    if key in CONSTANT:
        return f"config.{key} is no setting any more: it is {CONSTANT[key]} in every run"
    return ""


def explained(error: Exception) -> str:
    """What an experiment file raised, in one line; what became of a key of an earlier version.

    error: of ml_collections, which tells the key, but not its section.
    """
    said = " ".join(str(error).split())

    # Setting says 'Key "log_every" does not exist ...', reading "'vae_arch'".
    named = re.match(r"""['"]*(?:Key ")?(\w+)['"]*(?: does not exist|$)""", said)
    if named and isinstance(error, (AttributeError, KeyError)):
        for key in (*MOVED, *CONSTANT):
            if named[1] in key.split("."):
                return hint(key)
    return said


def _taken(values: dict[str, Any], key: str) -> Any:
    """Takes the value of a dotted key out of nested sections, and a section that it leaves empty."""
    section, name = key.split(".")
    inside = values.get(section)
    if not isinstance(inside, dict) or name not in inside:
        return _ABSENT
    value = inside.pop(name)
    if not inside:
        del values[section]
    return value


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key, or a whole section, unless it is there already."""
    section, _, name = key.partition(".")
    if not name:
        values.setdefault(section, value)
        return
    inside = values.setdefault(section, {})
    if isinstance(inside, dict):
        inside.setdefault(name, value)
