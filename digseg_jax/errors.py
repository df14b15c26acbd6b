# SPDX-License-Identifier: Apache-2.0
"""The one exception type for what a user can put right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: the message names the thing, the place and the legal values, in one line.

    `main` prints it without a traceback and exits with status 2.
    """


def nearest(name: str, legal: Iterable[str], n: int = 3) -> str:
    """Returns a hint such as `; did you mean 'a', 'b'?`, or an empty string."""
    close = difflib.get_close_matches(name, list(legal), n=n, cutoff=0.5)
    return f"; did you mean {', '.join(repr(c) for c in close)}?" if close else ""
