# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: DIR/checkpoints/STEP/{state,data,meta}, written by orbax in the background.

`state` is the sharded train state, `data` one integer (the next step of the stream), `meta` the
configuration and the library versions. A checkpoint that was cut off never gets its final name, so
it is never seen.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from digseg_jax.config import CheckpointConfig
from digseg_jax.errors import UserError

LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Checkpointer:
    """Saves and restores the state of one run; use as a context manager so that writes finish."""

    def __init__(self, workdir: str, config: CheckpointConfig):
        self.folder = epath.Path(workdir).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep, create=True, enable_async_checkpointing=True
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.manager.wait_until_finished()
        self.manager.close()

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step; None if there is none."""
        return self.manager.latest_step()

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Starts writing; a step that is already saved is left alone."""
        if step in self.manager.all_steps():
            return
        versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave({"next_step": step}),
            meta=ocp.args.JsonSave({**meta, "versions": versions}),
        )
        self.manager.save(step, args=items)

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[int, Any]:
        """The state of `step` (default: the latest), placed as the abstract leaves' shardings say.

        Raises:
          UserError: no checkpoint, or one that is damaged or of another model.
        """
        step = self.latest_step() if step is None else step
        if step is None:
            raise UserError(f"{self.folder}: no checkpoint here; train first")
        path = self.folder / str(step)
        try:
            restored = self.manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore()
                ),
            )
        except Exception as error:  # orbax raises many types; all of them mean an unusable folder
            reason = " ".join(str(error).split())[:400]
            earlier = [s for s in self.manager.all_steps() if s < step]
            advice = f"; to go back to step {max(earlier)}, remove {path}" if earlier else ""
            raise UserError(f"{path}: checkpoint cannot be read ({reason}){advice}") from error
        return int(restored["data"]["next_step"]), restored["state"]


def abstract_with_shardings(tree: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs that tell orbax where each leaf goes."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )
