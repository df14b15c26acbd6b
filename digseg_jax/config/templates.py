# SPDX-License-Identifier: Apache-2.0
"""Templates: texts with `{}` for the name of a class, such as "a photo of a {}".

They come from configurations, flags, manifests of shards and segmenter.json, so they are never handed
to `str.format`, which would read attributes ("{0.__class__}") and pad to any width ("{:>1000000000}").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from digseg_jax.errors import UserError

PLACE = "{}"


def fill(template: str, name: str) -> str:
    """The template with a name in its place; braces of the name stay as they are."""
    return template.replace(PLACE, name)


def check_template(template: Any, where: str) -> str:
    """Returns a template that has one `{}` and no other brace.

    where: what the error calls it, such as "config.data.templates".

    Raises:
      UserError: anything else.
    """
    text = template if isinstance(template, str) else ""
    if text.count(PLACE) != 1 or text.count("{") + text.count("}") != 2:
        raise UserError(f"{where}: {template!r} needs one {{}} for the class, and no other brace")
    return text


def asked_templates(wanted: Sequence[str], trained: Sequence[str], own: str = PLACE) -> tuple[str, ...]:
    """The templates that a vocabulary is asked in.

    One template by default, although training may draw from several: each further one costs another
    sampling, and training has seen the first one as often as any. The probabilities of several wanted
    ones are averaged.

    Args:
      wanted: by the user; empty: those of the weights.
      trained: of the weights, in their order; at least one.
      own: of the data set that is asked about; taken if training had it, as in a mixture of data sets
        that each had their own, else the first of `trained` is.
    """
    if wanted:
        return tuple(wanted)
    return (own if own in trained else trained[0],)
