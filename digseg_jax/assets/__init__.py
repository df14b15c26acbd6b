# SPDX-License-Identifier: Apache-2.0
"""The small weights that ship with the package: vae, prior, segmenter (see each folder's metadata)."""

from __future__ import annotations

from pathlib import Path

from digseg_jax.errors import UserError

FOLDER = Path(__file__).parent
PREFIX = "assets:"


def resolve(spec: str) -> str:
    """`assets:NAME` to the folder in this package; any other spec is returned as it is.

    Raises:
      UserError: no asset of that name.
    """
    if not spec.startswith(PREFIX):
        return spec
    folder = FOLDER / spec.removeprefix(PREFIX)
    if not (folder / "config.json").is_file():
        names = sorted(p.parent.name for p in FOLDER.glob("*/config.json"))
        legal = ", ".join(PREFIX + name for name in names) or "none is present in this checkout"
        raise UserError(f"{spec}: no such shipped weights; legal: {legal}")
    return str(folder)
