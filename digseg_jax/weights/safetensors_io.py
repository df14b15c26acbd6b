# SPDX-License-Identifier: Apache-2.0
"""Reads and writes the files of a component folder in diffusers' or transformers' layout.

A folder contains `config.json` and either one `.safetensors` file or shards with an index. Pickle
checkpoints can run code when opened, so they are never opened. Every fault becomes a UserError.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from digseg_jax.errors import UserError
from digseg_jax.io.files import LFS_POINTER, MAX_TEXT, read_bytes
from digseg_jax.io.json_file import parse_object
from digseg_jax.io.storage import inside
from digseg_jax.weights.catalog import CONVERT

DIFFUSERS_STEM = "diffusion_pytorch_model"
TRANSFORMERS_STEM = "model"
OPEN_CLIP_STEM = "open_clip_model"
STEMS = (DIFFUSERS_STEM, TRANSFORMERS_STEM, OPEN_CLIP_STEM, "open_clip_pytorch_model")
CONFIG_FILE = "config.json"
OPEN_CLIP_CONFIG_FILE = "open_clip_config.json"
PIPELINE_FILE = "model_index.json"  # lists the components of a pipeline, in the folder above them
_VARIANTS = ("", ".fp16")  # full precision first
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")  # named in the error, never opened
_DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}
_MAPPED_BYTES = 2**24  # bytes read before a file is reopened (`iter_tensors`)


class TensorInfo(NamedTuple):
    """Where a tensor is, and its shape as stored.

    Attributes:
        file: that contains it.
        shape: of the tensor.
        name: its key in the file; "": the key that it is listed under.
        rows: first row and the one behind the last, if it is a part of what the file stores; None: all.
    """

    file: Path
    shape: tuple[int, ...]
    name: str = ""
    rows: tuple[int, int] | None = None


def read_config(folder: Path) -> dict[str, Any]:
    """Parses `folder`/config.json, or open_clip_config.json if the former is missing.

    Raises:
        UserError: no such folder or file, a pipeline's folder, or not a JSON object.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder} (expected config.json and a .safetensors file)")

    # config.json first: some repositories have both, for transformers and for open_clip.
    open_clip = folder / OPEN_CLIP_CONFIG_FILE
    if open_clip.is_file() and not (folder / CONFIG_FILE).is_file():
        return _read_json(open_clip)
    if (folder / PIPELINE_FILE).is_file() and not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"{folder}: a whole pipeline; name one of its folders, such as {folder / 'unet'}"
        )
    return _read_json(folder / CONFIG_FILE)


def weight_files(folder: Path) -> list[Path]:
    """Finds the safetensors file of a component, or its shards in the index's order.

    folder: of the component; a file is a checkpoint that holds several components.

    Raises:
        UserError: there are none, only pickles, or a shard that the index names is missing.
    """
    if folder.is_file():
        return [folder]
    _, entry = _entry(folder)
    return _shards(entry) if entry.suffix == ".json" else [entry]


def component_files(folder: Path) -> dict[str, Path]:
    """The files of a component by the names that a copy gives them; a variant gets the plain names.

    Raises:
        UserError: as for `weight_files`, or no config.json.
    """
    read_config(folder)
    stem, entry = _entry(folder)

    # Shards keep their names, because the index names them.
    files = {CONFIG_FILE: folder / CONFIG_FILE}
    if entry.suffix == ".json":
        files[f"{stem}.safetensors.index.json"] = entry
        return files | {shard.name: shard for shard in _shards(entry)}
    return files | {f"{stem}.safetensors": entry}


def tensor_infos(files: list[Path]) -> dict[str, TensorInfo]:
    """Lists the tensors of all files without reading their data: key -> (file, shape).

    Raises:
        UserError: an unreadable file, a key that two files contain, or a number type without a
          counterpart here, such as float8.
    """
    infos: dict[str, TensorInfo] = {}
    for file in files:
        with _open(file) as handle:
            keys: list[str] = handle.keys()
            for key in keys:
                # Two shards with one key would leave the choice to their order.
                if key in infos:
                    raise UserError(f"key {key!r} is in both {infos[key].file} and {file}")

                part = handle.get_slice(key)
                if part.get_dtype() not in _DTYPES:
                    legal = ", ".join(sorted(_DTYPES))
                    raise UserError(f"{file}: {key!r} is {part.get_dtype()}; legal: {legal}")
                infos[key] = TensorInfo(file, tuple(part.get_shape()))
    return infos


def iter_tensors(infos: Mapping[str, TensorInfo]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (key, array) one by one, so that little beyond the result is ever in memory.

    Pages read through the mapping of a file count as resident until it is closed, so the file is
    reopened every 16 MiB.
    """
    for file in dict.fromkeys(info.file for info in infos.values()):
        keys = [key for key, info in infos.items() if info.file == file]
        while keys:
            read = 0  # bytes through the mapping that is open
            with _open(file) as handle:
                while keys and read < _MAPPED_BYTES:
                    tensor = _tensor(handle, keys[0], infos[keys[0]])
                    read += tensor.nbytes
                    yield keys.pop(0), tensor


def _tensor(handle: Any, key: str, info: TensorInfo) -> np.ndarray:
    """Reads one tensor, or the rows of it that `info` names."""
    if info.rows is None:
        return handle.get_tensor(info.name or key)
    first, behind = info.rows
    return handle.get_slice(info.name or key)[first:behind]


def read_metadata(folder: str | Path) -> dict[str, str]:
    """The `__metadata__` of a component's first weight file; empty if it has none."""
    # Shards repeat it, so the first is enough.
    with _open(weight_files(Path(folder))[0]) as handle:
        return dict(handle.metadata() or {})


def write_component(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    stem: str,
    metadata: Mapping[str, str] | None = None,
    config_file: str = CONFIG_FILE,
) -> Path:
    """Writes `config_file` and `stem`.safetensors, each by an atomic rename.

    Args:
      folder: made if missing.
      config: values of the config file.
      tensors: key -> array, in the hub's layout.
      stem: name of the weight file without ending.
      metadata: added to the file's `__metadata__`. There `format` is always "pt", without which
        transformers rejects a file.
      config_file: name of the config file.

    Returns:
      The weight file.

    Raises:
      UserError: metadata that is not str to str.
    """
    meta = {**(metadata or {}), "format": "pt"}
    for key, value in meta.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise UserError(f"metadata must map str to str, got {key!r}: {value!r}")

    folder.mkdir(parents=True, exist_ok=True)
    # save_file writes an array's buffer, so a transposed view must become an array of its own.
    arrays = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
    target = folder / f"{stem}.safetensors"
    _replace(target, lambda temporary: save_file(arrays, temporary, metadata=meta))

    # The config last: a folder with one has complete weights.
    text = json.dumps(dict(config), indent=2) + "\n"
    _replace(folder / config_file, lambda temporary: temporary.write_text(text))
    return target


def _replace(target: Path, write: Callable[[Path], object]) -> None:
    """Writes beside `target` and renames, so that a reader sees the old file or the new one."""
    # In the same folder, because a rename is atomic only within a file system; with the process's
    # number, so that two processes never share it.
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        # With the user's usual permissions, although safetensors writes for the owner alone.
        temporary.touch()
        permissions = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(permissions)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any]:
    """Parses a file that must contain a JSON object; raises UserError if it does not."""
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    data = read_bytes(path, MAX_TEXT)
    try:
        return parse_object(data)
    except ValueError as error:  # covers bad UTF-8 and bad JSON
        raise UserError(f"{path}: {error}") from error


def _entry(folder: Path) -> tuple[str, Path]:
    """The stem of a component's weights, and their file or the index of their shards.

    Raises:
      UserError: there are none, or only pickles.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder} (expected config.json and a .safetensors file)")

    # One file before shards, full precision before half: the first that exists is taken.
    for stem in STEMS:
        for variant in _VARIANTS:
            for name in (f"{stem}{variant}.safetensors", *_index_names(stem, variant)):
                if (folder / name).is_file():
                    return stem, folder / name
    raise UserError(_nothing_found(folder))


def _index_names(stem: str, variant: str) -> tuple[str, str]:
    """Names that an index of shards may have."""
    # diffusers once put the variant before ".index.json", and now puts it before ".safetensors".
    return (
        f"{stem}{variant}.safetensors.index.json",
        f"{stem}.safetensors.index{variant}.json",
    )


def _shards(index: Path) -> list[Path]:
    """Files of the shards that an index names.

    Raises:
      UserError: the index is malformed, or a shard is missing.
    """
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"no weight_map in {index}")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"weight_map in {index} must name a file for each key")

    # Each file once, in the order of first mention.
    files = [inside(index.parent, name) for name in dict.fromkeys(weight_map.values())]
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        raise UserError(f"{index} names {len(files)} shards; missing: {', '.join(missing)}")
    return files


def _open(file: Path) -> Any:
    """Opens a safetensors file; raises UserError that says what the file is instead."""
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(_why_unreadable(file, error)) from error


def _why_unreadable(file: Path, error: Exception) -> str:
    """Explains a file that is not there, is a git-LFS pointer, or is incomplete."""
    if not file.is_file():
        return f"no such file: {file}"

    # A clone without git-LFS has small text files in place of the weights.
    with file.open("rb") as handle:
        head = handle.read(len(LFS_POINTER))
    if head == LFS_POINTER:
        return f"{file} is a git-LFS pointer, not the weights; fetch them with `git lfs pull`"

    size = file.stat().st_size
    return f"{file} is not a complete safetensors file ({size} bytes; {error}); download it again"


def _nothing_found(folder: Path) -> str:
    """Explains a folder without weights, and names its pickles if there are any."""
    wanted = " or ".join(f"{stem}.safetensors" for stem in STEMS)
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)

    if pickles:
        return (
            f"{folder} holds only {', '.join(pickles)}, which this project does not open; "
            f"convert to {wanted}, where torch is installed: {CONVERT} {folder}"
        )
    return f"no {wanted} (or sharded index) in {folder}"
