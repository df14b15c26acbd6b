# SPDX-License-Identifier: Apache-2.0
"""Reads and writes components in the hub's folder layout, as NNX modules or as parameter trees."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from digseg_jax import trees
from digseg_jax.arraytypes import DTypeLike, Params
from digseg_jax.errors import UserError
from digseg_jax.models import functional
from digseg_jax.weights import keymap, single_file
from digseg_jax.weights.hub import resolve
from digseg_jax.weights.registry import Component, component_of, component_of_config, is_exactly
from digseg_jax.weights.safetensors_io import (
    TensorInfo,
    component_files,
    iter_tensors,
    read_config,
    tensor_infos,
    weight_files,
    write_component,
)

# A function from a tree of shapes to a tree of `jax.sharding.Sharding`,
# such as `functools.partial(sharding.infer_shardings, mesh=mesh)`.
Shardings = Callable[[Params], Params]


def load_config(
    path_or_hub_id: str | Path, *, subfolder: str = "", expect: str | tuple[str, ...] | None = None
) -> Any:
    """Reads a component's configuration, as the config dataclass of its model class.

    Raises:
      UserError: not found, unreadable, or of another class than `expect`.
    """
    component, values, infos, _ = open_component(path_or_hub_id, subfolder, _names(expect))
    return component.make_config(values, infos)


def load_component(
    path_or_hub_id: str | Path,
    *,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    subfolder: str = "",
    expect: str | tuple[str, ...] | None = None,
    shardings: Shardings | None = None,
    **options: Any,
) -> nnx.Module:
    """Builds the model that config.json names and fills it from the safetensors beside it.

    Args:
        path_or_hub_id: a folder, `org/name` or `org/name:subfolder`.
        dtype: compute dtype, float32 if None.
        param_dtype: dtype of the loaded leaves, whatever the file stores.
        subfolder: inside the folder or repository, such as "unet".
        expect: class name that the component must have; of several, the first that it contains. A whole
          CLIPModel needs it to say which encoder is wanted.
        shardings: from the parameters' shapes to their shardings; NumPy arrays on the host if None.
        **options: further arguments of the model's constructor.

    Raises:
        UserError: not found, unreadable, of another class, or keys that do not fit the class.
    """
    component, values, infos, folder = open_component(path_or_hub_id, subfolder, _names(expect))
    config = component.make_config(values, infos)

    # Structure and shapes only: no random parameters are made.
    compute = jnp.float32 if dtype is None else dtype
    graphdef, wanted = functional.abstract(
        lambda: component.model_class(config, rngs=functional.FixedRngs(), dtype=compute, **options)
    )

    params = _read(component, infos, folder, wanted, param_dtype, shardings)
    return functional.merge(graphdef, params)


def load_params(
    path_or_hub_id: str | Path,
    abstract_params: Params,
    *,
    subfolder: str = "",
    param_dtype: DTypeLike = jnp.float32,
    expect: str | tuple[str, ...] | None = None,
    shardings: Shardings | None = None,
) -> Params:
    """Fills a parameter tree from a checkpoint, tensor by tensor.

    Args:
        path_or_hub_id: a folder, `org/name` or `org/name:subfolder`.
        abstract_params: tree whose leaves have `shape`, such as `functional.abstract` returns.
        subfolder: inside the folder or repository.
        param_dtype: dtype of the loaded leaves, whatever the file stores.
        expect: class name that the component must have, see `load_component`.
        shardings: from the shapes to the leaves' shardings; NumPy arrays on the host if None. Each
          process places its own shards only.

    Raises:
        UserError: not found, unreadable, keys that do not match one to one, or values that are not
          finite.
    """
    component, _, infos, folder = open_component(path_or_hub_id, subfolder, _names(expect))
    return _read(component, infos, folder, abstract_params, param_dtype, shardings)


def save_component(
    model: nnx.Module | tuple[Any, Params],
    path: str | Path,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes a folder that diffusers or transformers loads, and `load_component` too.

    Args:
        model: a module with a `config`, or (config, params).
        path: the folder; made if missing, its files replaced atomically.
        metadata: provenance for the file's `__metadata__`.

    Returns:
        The weight file.
    """
    if isinstance(model, nnx.Module):
        config = model.config  # type: ignore[attr-defined]  # every model has one
        params = functional.split(model)[1]
    else:
        config, params = model

    # Rename and transpose to the hub's names and layouts.
    component = component_of_config(config)
    tensors = {
        component.key_prefix + keymap.hub_key(p): keymap.to_hub(p, np.asarray(x))
        for p, x in trees.flatten(params).items()
    }
    return write_component(
        Path(path), config.to_dict(), tensors, component.stem, metadata, component.config_file
    )


def copy_component(path_or_hub_id: str | Path, target: Path, *, expect: str | tuple[str, ...]) -> str:
    """Copies a component into a folder of its own, under the file names that every loader looks for.

    Files are copied unchanged, a block at a time, unless the checkpoint holds more than the component,
    or a class that diffusers and transformers do not have: such weights are read and written anew.

    Returns:
        The name of the component's class in diffusers or transformers.

    Raises:
        UserError: not found, unreadable, or of another class.
    """
    component, values, _, folder = open_component(path_or_hub_id, "", _names(expect))
    if folder.is_dir() and is_exactly(component, values, str(folder)):
        copy_files(component_files(folder), target)
        return component.name

    # open_clip wraps a BERT that transformers knows.
    model: Any = load_component(folder, expect=component.name)
    if component.name == "HFTextEncoder":
        model = model.transformer
    save_component(model, target)
    return type(model).__name__


def copy_files(files: Mapping[str, Path], target: Path) -> None:
    """Copies files to a folder under the given names, each by an atomic rename."""
    target.mkdir(parents=True, exist_ok=True)
    for name, source in files.items():
        copy = target / name

        # Source and target may be one folder: there is nothing to do then.
        if copy.exists() and copy.samefile(source):
            continue

        scratch = copy.with_name(f".{copy.name}.{os.getpid()}")
        try:
            shutil.copyfile(source, scratch)
            scratch.replace(copy)
        finally:
            scratch.unlink(missing_ok=True)


def _names(expect: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The expected class names as a tuple."""
    return (expect,) if isinstance(expect, str) else expect or ()


def open_component(
    path_or_hub_id: str | Path, subfolder: str, expect: tuple[str, ...] = ()
) -> tuple[Component, dict[str, Any], dict[str, TensorInfo], Path]:
    """Opens a component: its kind, config values, tensors (place and shape each), and its folder.

    The folder is a file if that is a checkpoint of several components (`single_file`).
    """
    folder = resolve(path_or_hub_id, subfolder)
    if folder.is_file():
        values, infos = single_file.read_part(folder, expect)
        return component_of(values, str(folder), expect), values, infos, folder

    values = read_config(folder)
    component = component_of(values, str(folder), expect)

    # Shapes come from the files' headers: no tensor is read yet.
    return component, values, tensor_infos(weight_files(folder)), folder


def _read(
    component: Component,
    infos: Mapping[str, TensorInfo],
    folder: Path,
    abstract_params: Params,
    param_dtype: DTypeLike,
    shardings: Shardings | None = None,
) -> Params:
    """Reads a component's tensors into the layout, type and shardings of this program."""
    # Pair every path with a stored key before any tensor is read.
    shapes = {p: tuple(x.shape) for p, x in trees.flatten(abstract_params).items()}
    files = dict.fromkeys(info.file for info in infos.values())
    source = str(next(iter(files))) if len(files) == 1 else f"{folder} ({len(files)} shards)"
    stored = {key: info.shape for key, info in infos.items()}
    pairs = keymap.match(shapes, stored, component.rules, source)

    # One tensor at a time, so that the host never holds more than the result and one tensor.
    targets = trees.flatten(shardings(abstract_params)) if shardings else {}
    loaded = {}
    for key, tensor in iter_tensors({k: infos[k] for k in pairs}):
        path = pairs[key]
        _check_finite(tensor, key, source)
        leaf = keymap.from_hub(path, tensor, shapes[path])

        # Wait: copies still under way would keep their tensors in the host's memory.
        loaded[path] = jax.block_until_ready(_put(leaf, param_dtype, targets.get(path)))

    # In the order of the model, not of the file.
    return trees.unflatten({path: loaded[path] for path in shapes})


def _check_finite(tensor: np.ndarray, key: str, source: str) -> None:
    """Raises UserError for nan or infinity in a tensor: every mask would be empty."""
    # A sum takes a fraction of the time, and no memory; it may be too large for a float by itself.
    with np.errstate(over="ignore", invalid="ignore"):
        total = tensor.sum(dtype=np.float32)
    if np.isfinite(total) or np.isfinite(tensor.astype(np.float32)).all():
        return
    raise UserError(f"{source}: {key} has values that are no numbers (nan or infinite)")


def _put(
    leaf: np.ndarray, dtype: DTypeLike, sharding: jax.sharding.Sharding | None
) -> np.ndarray | jax.Array:
    """Converts a leaf to its type, and leaves it on the host or places it as its sharding says."""
    # Convert on the host: on a device, each shape would cost a compilation.
    host = np.ascontiguousarray(leaf, dtype)

    if sharding is None:
        # A view would keep its file's buffer alive.
        return host if host.base is None else host.copy()

    # Copies of the shards, for the same reason.
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index].copy())
