# SPDX-License-Identifier: Apache-2.0
"""The experiment files of configs/, as the command line loads them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import ml_collections

CONFIGS = Path(__file__).parents[1] / "configs"


def get_config(name: str, *arguments: str) -> ml_collections.ConfigDict:
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arguments)
