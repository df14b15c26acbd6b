# SPDX-License-Identifier: Apache-2.0
"""The interface between a task and the training loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax

from digseg_jax.arraytypes import Array, Batch, Integer, Params, UInt8


@runtime_checkable
class Trainable(Protocol):
    """What the train step needs of a task.

    `frozen` goes into the jitted step as an argument, never as a constant.
    """

    frozen: Params
    abstract: Params  # shapes of the trainable parameters
    prompts: tuple[str, ...] = ()  # the bank's texts: what query ids stand for
    new: tuple[str, ...] = ()  # regexes on paths of parameters that no checkpoint gave

    def prepare(self) -> None:
        """Computes the constants of the task's programs, if any; before any of them is traced."""
        return  # by default there are none

    def constants(self) -> dict[str, Any]:
        """Those constants that a checkpoint must hold, JSON-ready; empty: none."""
        return {}

    def restore_constants(self, constants: dict[str, Any]) -> None:
        """Takes over `constants` of a checkpoint; before any program is traced."""
        return  # by default there are none

    def activation_bytes(self) -> float:
        """Estimated bytes of activations per image of the train step; 0: not worth counting."""
        return 0.0

    def loss(
        self,
        params: Params,
        frozen: Params,
        batch: Batch,
        keys: Array,
        whole: Batch | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss over the global batch and scalar metrics; `keys` is one key per example.

        whole: given when `batch` is one of the equal parts of an accumulated batch: that batch. The
          mean of the parts' losses must be the loss of the whole, so what is not a plain mean over
          examples (a count of valid cells, a deviation) is taken from `whole`.
        """


@runtime_checkable
class Task(Trainable, Protocol):
    """One kind of training, from its first parameters to the exported component.

    A task with a text bank also has `prompts`, the bank's texts: what query ids stand for.
    """

    def initial(self) -> Params:
        """Parameters at step 0, host arrays."""

    def export(self, params: Params, folder: Path, metadata: dict[str, str]) -> None:
        """Writes the trained component in diffusers' layout."""


def example_keys(seed: int, index: Integer[Array, "b"]) -> Array:
    """One random key per example, a pure function of (seed, global example index)."""
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(index)


def to_unit(image: UInt8[Array, "... c"]) -> Array:
    """uint8 to float32 in [-1, 1]."""
    return image.astype("float32") / 127.5 - 1.0
