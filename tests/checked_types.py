# SPDX-License-Identifier: Apache-2.0
"""The type checker of every test: beartype, as jaxtyping's import hook applies it to each function.

`conftest.py` installs it for the package by this module's name, so `check` must stay importable.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

# An int is a legal float (PEP 484's numeric tower), as for every other type checker.
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a function that jaxtyping made of one of ours, with the same signature.

    Self is exempt: beartype knows it in classes only, and jaxtyping hands over functions.
    """
    hints = function.__annotations__
    for name in [name for name, hint in hints.items() if hint is typing.Self]:
        hints[name] = Any
    return _beartype(function)
