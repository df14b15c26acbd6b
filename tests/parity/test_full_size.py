# SPDX-License-Identifier: Apache-2.0
"""Full size against torch: `pytest -m slow tests/parity/test_full_size.py` (15 GB of memory).

Weights are random, written by torch's own `save_pretrained`, and non-trivial everywhere. With
`DIGSEG_FULL_SIZE_LOG` set to a file, a line of JSON with the measured errors is added per component.
"""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from full_size import COMPONENTS, our_outputs, torch_outputs, write_torch
from oracle import relative_l2

from digseg_jax.models import functional
from digseg_jax.weights import load_component

LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}  # relative L2


def record(name: str, parameters: int, errors: dict[str, float]) -> None:
    path = os.environ.get("DIGSEG_FULL_SIZE_LOG")
    if path:
        with Path(path).open("a") as file:
            file.write(json.dumps({"name": name, "parameters": parameters, **errors}) + "\n")


def measure(component, folder: Path, expected) -> tuple[int, dict[str, float]]:
    """Number of parameters, and the largest error of each dtype and case over its outputs."""
    errors, count = {}, 0
    for dtype in LIMITS:
        model = load_component(folder, dtype=jnp.dtype(dtype))
        count = sum(x.size for x in jax.tree.leaves(functional.split(model)[1]))
        for case, arrays in our_outputs(component, model).items():
            pairs = zip(arrays, expected[case], strict=True)
            errors[f"{dtype} {case}"] = max(relative_l2(ours, theirs) for ours, theirs in pairs)
        del model
        gc.collect()
    return count, errors


@pytest.mark.slow
@pytest.mark.parametrize("name", list(COMPONENTS))
def test_outputs_equal_torchs(tmp_path, name):
    pytest.importorskip("torch")
    component = COMPONENTS[name]
    model = write_torch(component, tmp_path)
    expected = torch_outputs(component, model)
    del model
    gc.collect()
    assert all(np.isfinite(x).all() for arrays in expected.values() for x in arrays)
    count, errors = measure(component, tmp_path, expected)
    record(name, count, errors)
    assert component.parameters in (None, count)
    too_large = {key: e for key, e in errors.items() if not e <= LIMITS[key.split()[0]]}
    assert not too_large


@pytest.mark.parametrize("name", ["unet_sd15", "vae_encode", "clip_l14_text", "unet_sd21"])
def test_published_numbers_of_parameters(name):
    """Counted without allocating them."""
    from digseg_jax.weights.registry import COMPONENTS as CLASSES

    component = COMPONENTS[name]
    ours = CLASSES[component.class_name]
    config = ours.config_class.from_dict(component.config)
    rngs = functional.FixedRngs()
    _, params = functional.abstract(lambda: ours.model_class(config, rngs=rngs))
    assert sum(x.size for x in jax.tree.leaves(params)) == component.parameters
