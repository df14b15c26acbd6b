# SPDX-License-Identifier: Apache-2.0
"""Replay of the step at which a run's loss was not finite.

    python -m digseg_jax.tools.replay --workdir=DIR

On one process: restores the last checkpoint before the step and repeats the steps between.
Then prints which parameters are not finite before the step, the loss of every example, and
which gradients are not finite.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from digseg_jax import trees
from digseg_jax.arraytypes import Params
from digseg_jax.errors import UserError
from digseg_jax.io.checkpoint import Checkpointer
from digseg_jax.io.storage import as_path
from digseg_jax.io.workdir import CONFIG_NAME, stored_config
from digseg_jax.log import setup
from digseg_jax.runtime import cpu
from digseg_jax.runtime.door import run_tool
from digseg_jax.runtime.sharding import place_batch
from digseg_jax.training.failure import load_failure
from digseg_jax.training.loop import Trainer
from digseg_jax.training.tasks.base import Task, example_keys


def replay(workdir: str, trainer: Trainer) -> dict[str, Any]:
    """Repeats the saved step; see the module. The report is JSON-ready.

    Raises:
      UserError: nothing to replay, or the run has continued past the step since.
    """
    failure, batch = load_failure(workdir)
    with Checkpointer(workdir, trainer.config.checkpoint) as checkpointer:
        start, state = trainer.start_state(checkpointer)

    # A later checkpoint would be restored instead of the one before the failure.
    if start >= failure["step"]:
        raise UserError(
            f"{workdir}: the run has gone on to step {start}, past the failed step "
            f"{failure['step']}; remove the later checkpoints to replay it"
        )

    # Batches are a function of seed and step, so the steps between give the same parameters again; the
    # failed step's own batch comes from the file.
    with trainer.batches(start) as batches:
        for _ in range(start + 1, failure["step"]):
            placed = place_batch(next(batches), trainer.mesh)
            state, _ = trainer.step_fn(state, trainer.frozen, placed)

    params = state["params"]
    return {
        "step": failure["step"],
        "from_checkpoint": start,
        "parameters_not_finite": not_finite(params),
        **examine(trainer.task, failure["seed"], params, trainer.frozen, batch),
    }


def examine(
    task: Task, seed: int, params: Params, frozen: Params, batch: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Loss of each example alone, by its global index, and the gradients that are not finite."""

    def loss(params: Params, frozen: Params, part: dict[str, Any]) -> jax.Array:
        """Loss of a part of the batch, with the noise that the failed step drew."""
        return task.loss(params, frozen, part, example_keys(seed, part["index"]))[0]

    # One by one, to find the example behind the failure. As text, since JSON has no NaN.
    one = jax.jit(loss)
    losses = {}
    for i, index in enumerate(batch["index"]):
        part = {name: value[i : i + 1] for name, value in batch.items()}
        losses[int(index)] = repr(float(one(params, frozen, part)))
    return {
        "example_losses": losses,
        "gradients_not_finite": not_finite(jax.jit(jax.grad(loss))(params, frozen, batch)),
    }


def not_finite(tree: Params) -> list[str]:
    """Paths of the leaves with a value that is not finite."""
    finite = jax.jit(lambda x: jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), x))(tree)

    # Reduced on the devices: only one bit per leaf is fetched.
    return [path for path, ok in trees.flatten(jax.device_get(finite)).items() if not ok]


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m digseg_jax.tools.replay", description=__doc__)
    parser.add_argument("--workdir", required=True)
    workdir = parser.parse_args().workdir
    flags.FLAGS.mark_as_parsed()  # grain reads absl's flags outside absl.app
    setup()
    cpu.tune()
    return run_tool(partial(_replay_run, workdir))


def _replay_run(workdir: str) -> None:
    """Replays a run and prints the report as JSON."""
    from digseg_jax.training.setup import TASKS, set_up  # loads every task

    place = as_path(workdir)
    config = stored_config(place)
    if config is None:
        raise UserError(f"{place / CONFIG_NAME}: missing; --workdir must be that of a run")
    trainer = Trainer(set_up(config, TASKS[config.task]), str(place))
    trainer.check_batch()
    report = replay(str(place), trainer)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    sys.exit(main())
