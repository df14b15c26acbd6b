# SPDX-License-Identifier: Apache-2.0
"""Translates keys of earlier versions to their current names, or to the constants that replaced them.

Files that an earlier version wrote, a run's config.json or an export's segmenter.json, are read through
`with_current_names`; `hint` answers keys that somebody types from memory.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from digseg_jax.config.schema import is_free

# Old key -> current key. A value may also be a whole section.
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

# Settings that are constants now, with the value that every run has today.
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

_ABSENT = object()  # no value: None would be a legal one


def with_current_names(values: dict[str, Any]) -> dict[str, Any]:
    """Renames the keys of a stored configuration, given as nested sections, to their current names.

    A key that became a constant is left out, unless it changes the training and has another value:
    `parse` then rejects it by its name.
    """
    # A copy, because the caller may still compare or store the original.
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
    """Says what became of an earlier version's key, as the text of an error; "" if it never existed.

    key: dotted, such as "train.log_every", or a section such as "segmentation".
    """
    # The key itself, one inside a section that moved, or a section whose keys moved.
    for old, new in MOVED.items():
        if key == old or key.startswith(f"{old}."):
            return f"config.{key} is now config.{new}{key.removeprefix(old)}"
        if old.startswith(f"{key}."):
            return f"config.{old} is now config.{new}"

    if key in CONSTANT:
        return f"config.{key} is no longer a setting: it is {CONSTANT[key]} in every run"
    return ""


def explained(error: BaseException) -> str:
    """Text of what an experiment file raised, in one line; for an earlier version's key, its `hint`.

    error: any exception; ml_collections' own name a wrong key, but not its section.
    """
    said = " ".join(str(error).split())

    # ml_collections says 'Key "log_every" does not exist ...' on setting, and "'vae_arch'" on reading.
    named = re.match(r"""['"]*(?:Key ")?(\w+)['"]*(?: does not exist|$)""", said)
    if named and isinstance(error, (AttributeError, KeyError)):
        for key in (*MOVED, *CONSTANT):
            if named[1] in key.split("."):
                return hint(key)
    return said


def _taken(values: dict[str, Any], key: str) -> Any:
    """Removes a dotted key from nested sections and returns its value; `_ABSENT` if it is not there.

    A section that becomes empty is removed too, because it may not exist any more.
    """
    section, name = key.split(".")
    inside = values.get(section)
    if not isinstance(inside, dict) or name not in inside:
        return _ABSENT

    value = inside.pop(name)
    if not inside:
        del values[section]
    return value


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key, or a whole section, unless it is set already."""
    section, _, name = key.partition(".")
    if not name:
        values.setdefault(section, value)
        return
    inside = values.setdefault(section, {})
    if isinstance(inside, dict):
        inside.setdefault(name, value)
