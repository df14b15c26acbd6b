# SPDX-License-Identifier: Apache-2.0
"""Finds and loads experiment files by path or by name, from any working directory.

An experiment file defines `get_config()`, or `get_config(VARIANT)` for the text after a colon, as in
camvid:sd21. The files of configs/ are known by name, in a checkout and after `pip install`, which puts
them into share/digseg_jax/configs of the environment.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from digseg_jax.config.parse import check_key, default, parse, with_settings
from digseg_jax.config.renamed import explained
from digseg_jax.config.schema import Config
from digseg_jax.errors import UserError, nearest
from digseg_jax.io.files import expanded

# A checkout comes first, so that its files are used rather than those of an older installation.
FOLDERS = (
    Path(__file__).parents[2] / "configs",
    Path(sys.prefix) / "share" / "digseg_jax" / "configs",
)


# For --config.KEY=VALUE without an experiment file: this module then serves as one, with the defaults.
NO_FILE = __file__
get_config = default


def with_config_file(arguments: list[str]) -> list[str]:
    """Replaces the name in --config by the path of its file, which ml_collections can load.

    Args:
      arguments: the whole command line, the program's name first.

    Raises:
      UserError: no such file or name, or a wrong key in --config.KEY.
    """
    # Check the keys first: ml_collections would report a wrong one without its section.
    found, given = list(arguments), False
    overrides = [a.lstrip("-") for a in arguments[1:] if a.startswith(("--config.", "-config."))]
    for override in overrides:
        check_key(override.split("=")[0])

    # Both forms of a flag: --config=NAME, and --config NAME.
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag not in ("--config", "-config"):
            continue
        given = True
        if equals:
            found[i] = f"--config={find_config(value)}"
        elif i + 1 < len(arguments):
            found[i + 1] = find_config(arguments[i + 1])

    if overrides and not given:
        found.insert(1, f"--config={NO_FILE}")
    return found


def find_config(path_or_name: str | os.PathLike) -> str:
    """Finds the experiment file of a path or a name; keeps its ":VARIANT" if it has one.

    A file at that path takes precedence over configs/NAME.py of the package.

    Raises:
      UserError: there is neither, or the file is no Python.
    """
    text = os.fspath(path_or_name)
    place, colon, variant = text.partition(":")
    if expanded(place).is_file():
        if Path(place).suffix not in ("", ".py"):
            raise UserError(f"--config={text}: an experiment is a Python file with get_config()")
        return f"{expanded(place)}{colon}{variant}"

    # configs/quickstart.py works like quickstart, so that a command can be typed outside the checkout.
    name = place.removeprefix("configs/").removesuffix(".py")
    for folder in FOLDERS:
        if "/" not in name and (folder / f"{name}.py").is_file():
            return f"{folder / name}.py{colon}{variant}"

    legal = names()
    raise UserError(
        f"--config={text}: no such file, nor an experiment of that name{nearest(name, legal)}; "
        f"legal: a file, {', '.join(legal)}"
    )


def names() -> tuple[str, ...]:
    """Names of the experiments that `find_config` knows."""
    return tuple(sorted({file.stem for folder in FOLDERS for file in folder.glob("*.py")}))


def load_config(path_or_name: str | os.PathLike, **settings: Any) -> Config:
    """Loads an experiment file, and sets other values of some keys.

    Args:
      path_or_name: a file, or the name of one in configs/, with a ":VARIANT" if it has variants.
      **settings: dotted keys and their values.

    Raises:
      UserError: no such file, one that cannot be loaded, or a wrong key or value.

    Example:
        >>> config = dj.load_config("quickstart", **{"train.steps": 100, "eval.ensemble": 4})
        >>> config.train.steps
        100
    """
    # Any path will do: the file is not imported by a module's name.
    place, _, variant = find_config(path_or_name).partition(":")
    spec = importlib.util.spec_from_file_location("experiment", place)
    assert spec is not None and spec.loader is not None  # a path that ends in .py has both
    module = importlib.util.module_from_spec(spec)

    try:
        spec.loader.exec_module(module)
        values = module.get_config(*([variant] if variant else []))
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the file is a program: it may raise anything
        reason = f"{type(error).__name__}: {explained(error)}"
        raise UserError(f"--config={path_or_name}: cannot be loaded ({reason})") from error

    if not isinstance(values, Mapping | ml_collections.ConfigDict):
        kind = type(values).__name__
        raise UserError(f"--config={path_or_name}: get_config() returns {kind}, not a configuration")
    return with_settings(parse(values), settings)
