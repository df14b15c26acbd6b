# SPDX-License-Identifier: Apache-2.0
"""The small weights that ship with the package: vae, prior, segmenter, generalist.

Each weight file's metadata say how it was made. Weights are under the package's license unless a file
LICENSE lies beside them.
"""

from __future__ import annotations

from pathlib import Path

from digseg_jax.errors import UserError

FOLDER = Path(__file__).parent
PREFIX = "assets:"
LICENSE = "LICENSE"  # terms of the weights beside it, in short on its first line


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


def terms_of(folder: Path) -> str:
    """Terms of weights with a license of their own, in one sentence; "" for all others."""
    license_file = folder / LICENSE
    return license_file.read_text(encoding="utf-8").partition("\n")[0] if license_file.is_file() else ""
