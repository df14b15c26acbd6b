# SPDX-License-Identifier: Apache-2.0
"""Experiment files by path or by name, wherever the command is typed.

An experiment file defines `get_config()`, or `get_config(VARIANT)` for what follows a colon, as in
camvid:sd21. Those of configs/ are known by name, in a checkout and after `pip install`, which puts them
into share/digseg_jax/configs of the environment.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from digseg_jax.config.parse import check_key, default, parse, with_settings
from digseg_jax.config.renamed import explained
from digseg_jax.config.schema import Config
from digseg_jax.errors import UserError, nearest

FOLDERS = (
    Path(__file__).parents[2] / "configs",
    Path(sys.prefix) / "share" / "digseg_jax" / "configs",
)


# --config.KEY=VALUE without an experiment file: ml_collections reads its keys off this one
NO_FILE = __file__
get_config = default


def with_config_file(arguments: list[str]) -> list[str]:
    """A command line whose --config is the path of a file, so that ml_collections can load it.

    Raises:
      UserError: no such file or name, or a wrong key in --config.KEY.
    """
    found, given = list(arguments), False
    overrides = [a.lstrip("-") for a in arguments[1:] if a.startswith(("--config.", "-config."))]
    for override in overrides:
        check_key(override.split("=")[0])
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
    """The experiment file of a path or a name, with its ":VARIANT" if it has one.

    A file at that path comes first, then configs/NAME.py of the package.

    Raises:
      UserError: neither.
    """
    text = os.fspath(path_or_name)
    place, colon, variant = text.partition(":")
    if Path(place).expanduser().is_file():
        return f"{Path(place).expanduser()}{colon}{variant}"

    # configs/quickstart.py is meant too where the working directory is another one than the checkout
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
    """The experiments that `find_config` knows by name."""
    return tuple(sorted({file.stem for folder in FOLDERS for file in folder.glob("*.py")}))


def load_config(path_or_name: str | os.PathLike, **settings: Any) -> Config:
    """Loads an experiment file, with other values of some keys.

    path_or_name: a file, or the name of one in configs/, with a ":VARIANT" where it has some.

    Raises:
      UserError: no such file, one that cannot be loaded, or a wrong key or value.

    Example:
        >>> config = dj.load_config("quickstart", **{"train.steps": 100, "eval.ensemble": 4})
        >>> config.train.steps
        100
    """
    place, _, variant = find_config(path_or_name).partition(":")
    spec = importlib.util.spec_from_file_location("experiment", place)
    assert spec is not None and spec.loader is not None  # a path that ends in .py has both
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        values = module.get_config(*([variant] if variant else []))
    except UserError:
        raise
    except Exception as error:  # an experiment file is a program: it may raise anything
        reason = f"{type(error).__name__}: {explained(error)}"
        raise UserError(f"--config={path_or_name}: cannot be loaded ({reason})") from error
    return with_settings(parse(values), settings)
