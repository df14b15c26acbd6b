# SPDX-License-Identifier: Apache-2.0
"""From a folder or a hub id to a local folder."""

from __future__ import annotations

import re
from pathlib import Path

from digseg_jax.errors import UserError
from digseg_jax.weights.safetensors_io import STEMS

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(:(?P<sub>[\w./-]+))?")
_COMPANIONS = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt")


def resolve(path_or_hub_id: str | Path, subfolder: str = "") -> Path:
    """Returns the local folder of a component, downloading it where it names a hub repository.

    Args:
        path_or_hub_id: a folder, or `org/name` or `org/name:subfolder`. An existing folder wins.
        subfolder: inside the folder or repository.

    Raises:
        UserError: no such folder, or the hub does not give it.
    """
    spec = str(path_or_hub_id)
    local = Path(spec).expanduser()
    if local.exists():
        if not (local / subfolder).is_dir():
            raise UserError(f"no such folder: {local / subfolder}")
        return local / subfolder
    hub_id = _HUB_ID.fullmatch(spec)
    if hub_id is None or spec.startswith((".", "/", "~")):
        raise UserError(
            f"no such folder: {local}; legal: a folder, or a hub id such as org/name:subfolder"
        )
    return _download(hub_id["repo"], "/".join(filter(None, (hub_id["sub"], subfolder))))


def _download(repo: str, subfolder: str) -> Path:
    # Imported here: most runs never need the hub, and the import costs start-up time.
    from huggingface_hub import snapshot_download

    prefix = f"{subfolder}/" if subfolder else ""
    name = f"{repo}:{subfolder}" if subfolder else repo
    folder = Path()
    for variant in ("", ".fp16"):  # one precision only: the others are as large again
        try:
            root = snapshot_download(repo, allow_patterns=_patterns(prefix, variant))
        except (OSError, ValueError) as error:  # the hub client's errors derive from these
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"cannot get {name!r} from the hub, and no such folder exists: {reason}"
            ) from error
        folder = Path(root) / subfolder
        if any(folder.glob("*.safetensors")):
            return folder
    raise UserError(f"the hub's {name!r} has no {' or '.join(STEMS)}.safetensors")


def _patterns(prefix: str, variant: str) -> list[str]:
    weights = [
        f"{prefix}{stem}{tail}"
        for stem in STEMS
        for tail in (
            f"{variant}.safetensors",
            f"{variant}.safetensors.index.json",
            f".safetensors.index{variant}.json",
            f"{variant}-*-of-*.safetensors",
            f"-*-of-*{variant}.safetensors",
        )
    ]
    return [f"{prefix}{file}" for file in _COMPANIONS] + weights
