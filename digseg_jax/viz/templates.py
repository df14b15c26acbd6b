# SPDX-License-Identifier: Apache-2.0
"""Templates of all pages and model cards, filled in by Jinja.

A room keeps its templates beside its modules and names them by their path in the package, such as
report/run.html.j2. What several rooms show is in viz/parts.html.j2. Templates hold text and markup;
what is shown, and in which order, is decided in Python.
"""

from __future__ import annotations

import functools
import math
from importlib import resources
from typing import Any, TypeGuard

import jinja2
from markupsafe import Markup

MANY = 16  # classes up to which a list of them needs neither columns nor a search
_MOST_DECIMALS = 8


def render(template: str, **values: Any) -> str:
    """Fills in a template; in one of HTML, text among the values is escaped.

    template: its path in the package. A value that the template asks for must be there.
    """
    return _environment().get_template(template).render(values)


def render_part(template: str, part: str, *values: Any) -> Markup:
    """Fills in one macro of a template, such as a single section of a page."""
    return getattr(_environment().get_template(template).module, part)(*values)


def is_number(value: Any) -> TypeGuard[float]:
    """True for a finite int or float (not for bool)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def decimals(value: float) -> int:
    """Decimals that show at least three significant digits, at most 8: 0.01234 -> 4."""
    size = math.floor(math.log10(abs(value))) if value else 0
    return min(max(2 - size, 1), _MOST_DECIMALS)


def rounded(value: float, digits: int = 3) -> str:
    """Integers with thousands separators, floats with `digits` decimals."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}"


def text_of(name: str) -> str:
    """Text of a file of the package, such as a page's style."""
    return (resources.files("digseg_jax") / name).read_text(encoding="utf-8")


def _finite(value: Any) -> bool:
    """`is_number`; what a template was not given is an error here as everywhere in it."""
    bool(value)  # raises for Jinja's undefined values
    return is_number(value)


@functools.cache
def _environment() -> jinja2.Environment:
    """Jinja with this package's templates, escaping in those of HTML, and no silent gaps."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("digseg_jax", ""),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )

    # Lists and objects keep their order in scripts.
    environment.policies["json.dumps_kwargs"] = {}

    # `inline` puts a style or script of the package into a page as it is.
    environment.globals["inline"] = lambda name: Markup(text_of(name))
    environment.globals["many"] = MANY
    environment.tests["finite"] = _finite
    environment.filters |= {"rounded": rounded, "decimals": decimals, "repr": repr}
    return environment
