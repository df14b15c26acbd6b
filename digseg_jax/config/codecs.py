# SPDX-License-Identifier: Apache-2.0
"""What each codec makes of a query, by its name: for the codecs and for the rules between settings."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class QueryForm:
    """How a codec's queries reach the text encoder.

    closed: queries are the classes of one data set, and one text asks for all of them.
    pooled: a text enters as one token, its sentence feature, rather than word by word.
    lists: the U-Net reads all names about an image together, so training may leave some out.
    """

    closed: bool = False
    pooled: bool = False
    lists: bool = False


# a row for each legal value of config.model.codec
QUERY_FORMS = {
    "binary": QueryForm(),
    "palette": QueryForm(closed=True),
    "prompted": QueryForm(pooled=True, lists=True),
}
