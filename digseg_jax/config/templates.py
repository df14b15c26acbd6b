# SPDX-License-Identifier: Apache-2.0
"""Prompt templates: texts with `{}` in the place of a class name, such as "a photo of a {}".

They come from configurations, flags, manifests of shards and segmenter.json, so they are never handed
to `str.format`, which would read attributes ("{0.__class__}") and pad to any width ("{:>1000000000}").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from digseg_jax.errors import UserError
from digseg_jax.io.names import UNSEEN

PLACE = "{}"  # where the name goes


def fill(template: str, name: str) -> str:
    """Puts a name into a template; braces in the name stay as they are."""
    return template.replace(PLACE, name)


def check_template(template: Any, where: str) -> str:
    """Checks that a template is a text with one `{}` and no other brace, and returns it.

    Args:
      template: any value, as it was read.
      where: what the error calls it, such as "config.data.templates".

    Raises:
      UserError: it is none, or has characters that cannot be seen.
    """
    # Other braces are most likely format codes, such as {name} or {0:>5}, which are not supported.
    text = template if isinstance(template, str) else ""
    if text.count(PLACE) != 1 or text.count("{") + text.count("}") != 2:
        raise UserError(f"{where}: {template!r} needs one {{}} for the class, and no other brace")
    if UNSEEN.search(text):
        raise UserError(f"{where}: {template!r} has a control or invisible character; type it again")
    return text


def asked_templates(wanted: Sequence[str], trained: Sequence[str], own: str = PLACE) -> tuple[str, ...]:
    """Chooses the templates that a vocabulary is asked in.

    By default it is one, although training may draw from several: each further one costs another
    sampling, and training has seen the first one as often as any. If the user wants several, their
    probabilities are averaged.

    Args:
      wanted: the user's templates; empty: take one of `trained`.
      trained: templates that the weights were trained with, in their order; at least one.
      own: template of the data set that is asked about. It is taken if training used it, as in a
        mixture of data sets with a template each; else the first of `trained` is.
    """
    if wanted:
        return tuple(wanted)
    return (own if own in trained else trained[0],)
