# SPDX-License-Identifier: Apache-2.0
"""From a folder or a hub id to a local folder."""

from __future__ import annotations

import re
from pathlib import Path

from digseg_jax.errors import UserError, nearest
from digseg_jax.weights import known
from digseg_jax.weights.safetensors_io import CONFIG_FILE, OPEN_CLIP_CONFIG_FILE, STEMS

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(:(?P<sub>[\w./-]+))?")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
COMPANIONS = (CONFIG_FILE, OPEN_CLIP_CONFIG_FILE, *_TOKENIZER_FILES)  # small files beside weights


def resolve(path_or_hub_id: str | Path, subfolder: str = "") -> Path:
    """Returns the local folder of a component, downloading it where it names a hub repository.

    Args:
        path_or_hub_id: a folder, `org/name` or `org/name:subfolder`, or a name of `weights.known`.
            An existing folder wins.
        subfolder: inside the folder or repository.

    Raises:
        UserError: no such folder, or the hub does not give it.
    """
    found = _locate(path_or_hub_id, subfolder)
    return found if isinstance(found, Path) else _download(*found)


def resolve_pickles(path_or_hub_id: str | Path, stems: tuple[str, ...]) -> Path:
    """The same for a component of which the hub has pickles only: `stems` without ending."""
    found = _locate(path_or_hub_id, "")
    if isinstance(found, Path):
        return found
    repo, subfolder = found
    prefix = f"{subfolder}/" if subfolder else ""
    files = [f for stem in stems for f in (f"{stem}.bin", f"{stem}-*-of-*.bin")]
    return _snapshot(repo, subfolder, [f"{prefix}{f}" for f in (*files, *COMPANIONS)])


def _locate(path_or_hub_id: str | Path, subfolder: str) -> Path | tuple[str, str]:
    """A local folder, or a repository and the subfolder in it."""
    spec = str(path_or_hub_id)
    local = Path(spec).expanduser()
    if local.exists():
        if not (local / subfolder).is_dir():
            raise UserError(f"no such folder: {local / subfolder}")
        return local / subfolder
    hub_id = _HUB_ID.fullmatch(known.expand(spec))
    if hub_id is None or spec.startswith((".", "/", "~")):
        hint = nearest(spec, known.names())
        raise UserError(
            f"no such folder: {local}; legal: a folder, or a hub id such as org/name:subfolder{hint}"
        )
    return hub_id["repo"], "/".join(filter(None, (hub_id["sub"], subfolder)))


def _download(repo: str, subfolder: str) -> Path:
    prefix = f"{subfolder}/" if subfolder else ""
    for variant in ("", ".fp16"):  # one precision only: the others are as large again
        folder = _snapshot(repo, subfolder, _patterns(prefix, variant))
        if any(folder.glob("*.safetensors")):
            return folder
    raise UserError(
        f"the hub's {repo}{':' if subfolder else ''}{subfolder} has no "
        f"{' or '.join(STEMS)}.safetensors; if it has pickles: {known.CONVERT} {repo} DIR"
    )


def _snapshot(repo: str, subfolder: str, patterns: list[str]) -> Path:
    # Imported here: most runs never need the hub, and the import costs start-up time.
    from huggingface_hub import snapshot_download

    name = f"{repo}:{subfolder}" if subfolder else repo
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns)) / subfolder
    except (OSError, ValueError) as error:  # the hub client's errors derive from these
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"cannot get {name!r} from the hub, and no such folder exists: {reason}"
        ) from error


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
    beside = prefix.removesuffix("text_encoder/")  # a pipeline keeps the tokenizer next to it
    tokenizer = [f"{beside}tokenizer/{f}" for f in _TOKENIZER_FILES] if beside != prefix else []
    return [f"{prefix}{file}" for file in COMPANIONS] + tokenizer + weights
