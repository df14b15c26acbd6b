# SPDX-License-Identifier: Apache-2.0
"""DiGSeg in JAX: a Stable Diffusion U-Net fine-tuned to denoise segmentation masks.

    import digseg_jax as dj

    segment = dj.load_segmenter("assets:segmenter")  # or a run, its export, gs://..., a hub id
    masks = segment("photo.jpg", ["snow and ice", "forest"], ensemble=8, steps=2)
    masks.probability, masks.label, masks.save("out")

    config = dj.load_config("quickstart", **{"train.steps": 100})
    dj.train(config, "runs/mine")
    dj.evaluate("runs/mine")

The names in `__all__` are the public ones; all else may change. They are loaded when they are used, so
that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PLACES = {
    "Config": "config.schema:Config",
    "Masks": "prediction.masks:Masks",
    "Segmenter": "prediction.pretrained:PretrainedSegmenter",
    "dataset_names": "data.datasets.registry:names",
    "evaluate": "jobs:evaluate",
    "export": "jobs:export",
    "load_component": "weights:load_component",
    "load_config": "config.experiment:load_config",
    "load_segmenter": "prediction.pretrained:load_segmenter",
    "open_dataset": "data.sources:open_dataset",
    "save_component": "weights:save_component",
    "train": "jobs:train",
}
__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    """Loads a public name; the first one tunes JAX's start as the command line does."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from digseg_jax.runtime import cpu, gpu

    cpu.tune()
    gpu.tune()
    module, _, attribute = _PLACES[name].partition(":")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
