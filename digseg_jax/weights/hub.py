# SPDX-License-Identifier: Apache-2.0
"""Finds the local folder of a component, given a folder or a hub id."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from etils import epath

from digseg_jax.errors import Transient, UserError, nearest
from digseg_jax.io.files import expanded
from digseg_jax.io.storage import AnyPath, SomePath, as_path, explained, is_remote, local_copy
from digseg_jax.weights import catalog, single_file
from digseg_jax.weights.download import snapshot
from digseg_jax.weights.safetensors_io import (
    CONFIG_FILE,
    OPEN_CLIP_CONFIG_FILE,
    PIPELINE_FILE,
    STEMS,
    component_files,
)

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<sub>[\w./-]+))?")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
TOKENIZER = "tokenizer"  # a pipeline's folder of it, beside its text_encoder
SCHEDULER = "scheduler"  # the same, beside its unet
_PIPELINE_PARTS = ("unet", "vae", "text_encoder", TOKENIZER, SCHEDULER, "image_processor")
_EXPORT_FILES = (  # files of an exported segmenter
    "segmenter.json",
    "palette.json",
    "prompted.json",
    "calibration.json",
    PIPELINE_FILE,
    "scheduler_config.json",
    "preprocessor_config.json",
    "README.md",
    "LICENSE",
)
SCHEDULER_FILE = f"{SCHEDULER}/scheduler_config.json"  # in a pipeline, whose U-Net is in unet/
# Small files to download beside the weights.
COMPANIONS = (CONFIG_FILE, OPEN_CLIP_CONFIG_FILE, *_TOKENIZER_FILES, *_EXPORT_FILES)


class _Repository(NamedTuple):
    """A component's place on the hub; folder: the local one that its spec would name, "" for none."""

    id: str
    revision: str | None
    subfolder: str
    folder: str = ""

    @property
    def prefix(self) -> str:
        """The subfolder with a final slash; "" for the root."""
        return f"{self.subfolder}/" if self.subfolder else ""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return self.id + revision + (f":{self.subfolder}" if self.subfolder else "")


def resolve(path_or_hub_id: str | Path, subfolder: str = "") -> Path:
    """Returns the local folder of a component; downloads it if the spec names a hub repository.

    A `.safetensors` file is returned as it is: `single_file` reads components from it.

    `huggingface_hub` downloads, so its cache, login or HF_TOKEN, HF_HOME, HF_ENDPOINT and
    HF_HUB_OFFLINE apply here too.

    Args:
        path_or_hub_id: a folder or a `.safetensors` file (gs:// too), a hub id
          `org/name[@revision][:subfolder]`, or a name of `digseg_jax.weights.catalog`. What exists
          takes precedence. A revision is a branch, a tag or a commit; by default the main branch.
        subfolder: inside the folder or repository.

    Raises:
        UserError: there is no such folder, or the hub does not deliver it.
    """
    found = _locate(path_or_hub_id, subfolder)
    if isinstance(found, Path):
        return found
    with _no_folder(found):
        return _download(found)


def resolve_pipeline(path_or_hub_id: str | Path) -> Path:
    """Returns the local folder of a whole exported segmenter, with all its components.

    Args:
      path_or_hub_id: as for `resolve`.

    Raises:
      UserError: as for `resolve`.
    """
    found = _locate(path_or_hub_id, "")
    if isinstance(found, Path):
        return found

    # Exports have their weights in unet/, older ones beside segmenter.json.
    folders = [found.prefix, *(f"{found.prefix}{part}/" for part in _PIPELINE_PARTS)]
    patterns = [pattern for prefix in folders for pattern in _patterns(prefix, "")]
    with _no_folder(found):
        return _snapshot(found, [*patterns, f"{found.prefix}*.py", f"{found.prefix}*/*.py"])


def resolve_tokenizer(path_or_hub_id: str) -> Path:
    """Returns the local folder of a hub pipeline's tokenizer, downloaded without the weights.

    Raises:
      UserError: as for `resolve`.
    """
    found = _locate(path_or_hub_id, TOKENIZER)
    if isinstance(found, Path):
        return found
    with _no_folder(found):
        return _snapshot(found, [f"{found.prefix}{file}" for file in _TOKENIZER_FILES])


def resolve_pickles(path_or_hub_id: str | Path, stems: tuple[str, ...]) -> Path:
    """Returns the local folder of a component that the hub has as pickles only.

    Args:
      path_or_hub_id: as for `resolve`.
      stems: names of the weight files without ending.

    Raises:
      UserError: as for `resolve`.
    """
    found = _locate(path_or_hub_id, "")
    if isinstance(found, Path):
        return found

    # Weights are one file, or shards.
    files = [f for stem in stems for f in (f"{stem}.bin", f"{stem}-*-of-*.bin")]
    with _no_folder(found):
        beside = _of_pipeline(found.prefix)
        return _snapshot(found, [f"{found.prefix}{f}" for f in (*files, *COMPANIONS)] + beside)


def converted_folder(path_or_hub_id: str | Path) -> Path:
    """Default output of `tools.convert_weights`: a local folder itself, or one beside the hub's cache.

    `resolve` looks there before it asks the hub.
    """
    found = _locate(path_or_hub_id, "")
    return found if isinstance(found, Path) else _beside_cache(found)


def _beside_cache(repository: _Repository) -> Path:
    """The folder for a repository's converted weights."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "digseg_jax" / re.sub("[/:]", "--", str(repository))


def _locate(path_or_hub_id: str | Path, subfolder: str) -> Path | _Repository:
    """A local folder if there is one, else the repository that the spec names.

    Raises:
      UserError: neither a folder nor a hub id.
    """
    spec = str(path_or_hub_id)
    if not spec.strip():
        raise UserError("no weights are named: a folder, a file or a hub id such as sd-1.5:unet")
    if is_remote(spec):
        return _copied(as_path(spec) / subfolder)

    local = expanded(spec)
    if local.exists():
        if local.is_file():
            return _checked_file(local)
        if not (local / subfolder).is_dir():
            raise UserError(f"no such folder: {local / subfolder}")
        return local / subfolder

    # A spec that looks like a path was meant as one, though `./x` also has the form of a hub id.
    hub_id = _HUB_ID.fullmatch(catalog.expand(spec))
    if hub_id is None or (catalog.find(spec) is None and _is_path(spec)):
        kind = "file" if single_file.ENDING in spec else "folder"
        likely = _part_of(spec) or nearest(spec.replace("/", ":", 1), catalog.names())
        raise UserError(
            f"no such {kind}: {spec} (looked at {os.path.abspath(local)}); legal: a folder, a Stable "
            f"Diffusion's {single_file.ENDING} file without a part, or a hub id such as "
            f"org/name:subfolder{likely}"
        )

    inside = "/".join(filter(None, (hub_id["sub"], subfolder)))
    looked = "" if catalog.find(spec) else os.path.abspath(local)
    return _Repository(hub_id["repo"], hub_id["revision"], inside, looked)


def _is_path(spec: str) -> bool:
    """Whether a spec in the form of a hub id was meant as a path: by its look, or by what is there."""
    if spec.startswith((".", "/", "~")) or single_file.ENDING in spec:
        return True
    if spec.replace("/", ":", 1) in catalog.names():  # sd-1.5/unet was meant as sd-1.5:unet
        return True

    # org/name beside a folder org that is here.
    return "/" in spec and expanded(spec).parent.is_dir()


def _part_of(spec: str) -> str:
    """A hint where a part of an existing folder is written as one of a repository; "" otherwise."""
    folder, _, part = spec.rpartition(":")
    if not folder or not (expanded(folder) / part).is_dir():
        return ""
    return f"; did you mean {os.path.join(folder, part)!r}?"


def _copied(place: AnyPath) -> Path:
    """A local copy of a component in a bucket, with what a pipeline has beside it.

    Raises:
      UserError: nothing there, a file of another kind, or it cannot be read.
    """
    beside = tuple(name for name in (TOKENIZER, SCHEDULER) if name != place.name)
    with explained(place, "cannot be read"):
        if place.is_dir() or not place.exists():
            return local_copy(place, beside)
        _checked_file(place)
        found = epath.Path(place).stat()

    # A whole Stable Diffusion is asked for three times, for its U-Net, autoencoder and text encoder.
    return _copied_file(os.fspath(place), found.length, found.mtime, beside)


@functools.lru_cache(maxsize=1)
def _copied_file(place: str, length: int, mtime: float, beside: tuple[str, ...]) -> Path:
    """`local_copy` of a file of this size and time, made once."""
    copy = local_copy(as_path(place), beside)
    if (copied := copy.stat().st_size) != length:
        raise Transient(f"{place}: {copied} bytes came, of {length}")
    return copy


def _checked_file(file: SomePath) -> SomePath:
    """The file, if whole checkpoints are read from such files; raises UserError if not."""
    if file.suffix == single_file.ENDING:
        return file
    raise UserError(
        f"{file}: not a {single_file.ENDING} file, and pickles are never opened here; where torch is "
        f"installed, diffusers converts a checkpoint: {single_file.SPLIT}"
    )


def _download(repository: _Repository) -> Path:
    """Returns the folder of a repository's component: converted, cached or downloaded.

    Raises:
      UserError: the hub does not deliver it, or has it as pickles only.
    """
    converted = _beside_cache(repository)
    if any(converted.glob("*.safetensors")):
        return converted

    # Full precision, else half; never both, because each is a whole copy of the weights.
    for variant in ("", ".fp16"):
        try:
            folder = _snapshot(repository, _patterns(repository.prefix, variant))
        except UserError as error:
            # Without a network: what is cached may lack only what can be done without.
            if cached := _complete_cached(error, repository):
                return cached
            raise
        if any(folder.glob("*.safetensors")):
            return folder

    # Nothing that can be read: say whether the name or the format is wrong.
    if not folder.is_dir():
        raise UserError(
            f"cannot get {str(repository)!r} from the hub: no such folder in that repository, or "
            "neither config nor weights in it"
        )
    part = (
        "" if repository.subfolder else f"of a whole pipeline name a part, as {repository}:unet; else "
    )
    raise UserError(
        f"the hub's {str(repository)!r} has no safetensors ({', '.join(STEMS)}), and pickles are never "
        f"opened here; {part}convert it once, where torch is installed: {catalog.CONVERT} "
        f"{catalog.short(str(repository))}; it is found from then on"
    )


def _complete_cached(error: UserError, repository: _Repository) -> Path | None:
    """The folder of a component whose configuration and weights are cached, of either variant."""
    root = getattr(error.__cause__, "snapshot_path", None)  # of the client's IncompleteSnapshotError
    if root is None:
        return None
    folder = Path(root) / repository.subfolder
    try:
        component_files(folder)
    except UserError:
        return None
    return folder


@contextlib.contextmanager
def _no_folder(repository: _Repository) -> Iterator[None]:
    """Adds to the hub's errors that there is no such folder here either: one may have been meant."""
    try:
        yield
    except UserError as error:
        if not repository.folder:
            raise
        local = f"no such folder on this machine either: {repository.folder}"
        raise type(error)(f"{error} ({local})") from error


def _snapshot(repository: _Repository, patterns: list[str]) -> Path:
    """Downloads the matching files and returns the component's folder among them."""
    root = snapshot(repository.id, repository.revision, patterns, str(repository))
    return root / repository.subfolder


def _patterns(prefix: str, variant: str) -> list[str]:
    """Names of all files that a component may need, for one variant of its weights ("" or ".fp16")."""
    # Both spellings of a variant: diffusers has changed its place in the name (`safetensors_io`).
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

    return [f"{prefix}{file}" for file in COMPANIONS] + _of_pipeline(prefix) + weights


def _of_pipeline(prefix: str) -> list[str]:
    """Names of the files that a pipeline keeps beside the component that needs them."""
    # The tokenizer beside its text encoder.
    beside = prefix.removesuffix("text_encoder/")
    tokenizer = [f"{beside}{TOKENIZER}/{f}" for f in _TOKENIZER_FILES] if beside != prefix else []

    # Its scheduler says how the U-Net beside it was trained.
    above = prefix.removesuffix("unet/")
    return tokenizer + ([f"{above}{SCHEDULER_FILE}"] if above != prefix else [])
