# SPDX-License-Identifier: Apache-2.0
"""Converts between NNX modules and the nested dicts of arrays that the rest of the project uses.

Jitted functions take dicts: a call with a dict of 700 arrays starts tens of times faster than one with
a module of as many parameters, and a checkpoint of a dict does not depend on flax's variable classes.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from digseg_jax.arraytypes import Params
from digseg_jax.models.layers import Compute
from digseg_jax.trees import flatten, unflatten

Model = TypeVar("Model", bound=nnx.Module)


class FixedRngs(nnx.Rngs):
    """Replaces `nnx.Rngs` where a model is built for its shapes only, under `abstract`.

    An `nnx.Rngs` counts its draws in a traced variable, and every update of it costs time in
    proportion to the trace so far: 6 s instead of 1 s for Stable Diffusion 1.5's U-Net.
    """

    def __init__(self):
        pass  # no streams

    def params(self) -> jax.Array:
        """Returns the same key for every layer."""
        return jax.random.key(0)


def split(model: Model) -> tuple[nnx.GraphDef[Model], Params]:
    """Returns the static structure and the parameters as a pure dict with string keys."""
    graphdef, state = nnx.split(model, nnx.Param)
    return graphdef, _string_keys(nnx.to_pure_dict(state))


def merge(graphdef: nnx.GraphDef[Model], params: Params) -> Model:
    """Rebuilds a module, the inverse of `split`; cheap, meant to be called inside a jitted function."""
    return nnx.merge(graphdef, nnx.State(_variables(params)))


def abstract(factory: Callable[[], Model]) -> tuple[nnx.GraphDef[Model], Params]:
    """Splits `factory()` as `split` does, with `jax.ShapeDtypeStruct` leaves; allocates nothing."""
    return split(nnx.eval_shape(factory))


def as_written(graphdef: nnx.GraphDef[Model], params: Params) -> nnx.GraphDef[Model]:
    """Returns the structure of the same model computed layer by layer, without kernels and remat.

    Args:
      graphdef: structure of the model.
      params: its parameters, or their shapes.
    """
    # Every layer has its own `Compute`; only the type of the activations stays.
    model = merge(graphdef, params)
    for _, module in nnx.iter_modules(model):
        if isinstance(how := getattr(module, "compute", None), Compute):
            module.compute = Compute(dtype=how.dtype)  # type: ignore[attr-defined]  # just found in it
    return split(model)[0]


def random_init(abstract_params: Params, seed: int, zero: str = "") -> Params:
    """Draws random parameters as float32 NumPy arrays, each a pure function of (seed, its path).

    Kernels are uniform with variance 1 / (3 fan_in), torch's default; embeddings are normal with
    standard deviation 0.02; scales are one; biases are zero, and so is every path that the regex `zero`
    matches. They are drawn on the host, because compiling one random program per shape takes longer
    than training steps do, and because the values then depend on neither backend nor mesh.
    """
    flat = flatten(abstract_params)
    return unflatten({path: _draw(path, leaf.shape, seed, zero) for path, leaf in flat.items()})


def _draw(path: str, shape: tuple[int, ...], seed: int, zero: str) -> np.ndarray:
    """Values of one parameter, by the last part of its path; see `random_init`."""
    leaf = path.rsplit(".", 1)[-1]
    if leaf == "bias" or (zero and re.search(zero, path)):
        return np.zeros(shape, np.float32)
    if leaf == "scale":
        return np.ones(shape, np.float32)

    # The path is part of the key, so that no parameter depends on how many came before it.
    rng = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(path.encode())]))
    if leaf == "embedding":
        return 0.02 * rng.standard_normal(shape, np.float32)

    # All axes but the last are inputs: [in, out], or [h, w, in, out] of a convolution.
    bound = 1.0 / math.sqrt(math.prod(shape[:-1]))
    return bound * (2.0 * rng.random(shape, np.float32) - 1.0)


def _string_keys(tree: Any) -> Any:
    """The tree with every key as text; NNX numbers the layers of a list."""
    if isinstance(tree, Mapping):
        return {str(k): _string_keys(v) for k, v in tree.items()}
    return tree


def _variables(tree: Any) -> Any:
    """The tree in NNX's form: numbers for the layers of a list, `nnx.Param` around arrays."""
    if isinstance(tree, Mapping):
        return {int(k) if k.isdigit() else k: _variables(v) for k, v in tree.items()}
    return nnx.Param(tree)
