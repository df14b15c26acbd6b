# SPDX-License-Identifier: Apache-2.0
"""Table of what experiments need on which hardware: memory, hours of training and of evaluation.

    python -m digseg_jax.tools.hardware_table configs/ade20k.py --into=configs/README.md

An estimate from shapes alone, in the same way for every device: nothing is downloaded, and no compiler
of the device is asked. Memory is what a device stores, and the results of the train step as it is
written (`aot.liveness`). Hours are the model's FLOPs at the chips' peak rates, which no run reaches; an
evaluation is counted with one view an image.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from digseg_jax.aot import cuda, programs, topology
from digseg_jax.aot.advice import state_bytes
from digseg_jax.aot.shapes import Architecture, UNetTask
from digseg_jax.config.experiment import load_config
from digseg_jax.config.parse import with_settings
from digseg_jax.config.schema import MeshConfig
from digseg_jax.data.datasets import registry
from digseg_jax.errors import UserError
from digseg_jax.log import log
from digseg_jax.log import setup as setup_log
from digseg_jax.runtime import gpu
from digseg_jax.runtime.door import run_tool
from digseg_jax.runtime.hardware import CHIPS, Chip
from digseg_jax.runtime.sharding import make_mesh
from digseg_jax.training.flops import step_flops, traced_flops
from digseg_jax.training.setup import Machine, set_up
from digseg_jax.training.step import abstract_state
from digseg_jax.training.tasks.segmentation import SegmentationTask

# Columns of the table: title, chip, number of chips.
DEVICES = (
    ("24 GB (RTX 4090)", "rtx4090", 1),
    ("40 GB (A100)", "a100-40gb", 1),
    ("80 GB (A100)", "a100", 1),
    ("16 x TPU v5e", "v5e", 16),
    ("16 x TPU v6e", "v6e", 16),
)
BEGIN, END = "<!-- digseg_jax.tools.hardware_table -->", "<!-- end -->"
GB, HOUR = 1e9, 3600.0


@dataclasses.dataclass(frozen=True)
class Needs:
    """What an experiment needs on some devices.

    Attributes:
      memory, budget: bytes of one device that the train step needs, and that a run gets.
      microbatches: parts that a batch is split into.
      training, evaluation: seconds at the chips' peak rates.
    """

    memory: float
    budget: float
    microbatches: int
    training: float
    evaluation: float

    def __str__(self) -> str:
        memory = f"{self.memory / GB:.1f}"
        if self.memory > self.budget:
            return f"{memory} of {self.budget / GB:.1f} GB"
        parts = f" in {self.microbatches} parts" if self.microbatches > 1 else ""
        hours = f"{_hours(self.training)} + {_hours(self.evaluation)} h"
        return f"{memory} GB{parts}, {hours}"


def _hours(seconds: float) -> str:
    """Hours with two digits; less than a hundredth is shown as such."""
    return f"{seconds / HOUR:.2g}" if seconds >= 36 else "<0.01"


def budget_of(chip: Chip) -> float:
    """Bytes of a chip's memory that a run gets."""
    if chip.capability:
        return chip.hbm_bytes * gpu.memory_share()
    return chip.hbm_bytes - topology.RESERVED


class Counter:
    """Counts the needs of experiments; what several of them share is traced once.

    devices: simulated ones, as many as the largest slice has.
    """

    def __init__(self, devices: list[jax.Device]):
        self.devices = devices
        self._known: dict[str, float] = {}

    def machine(self, kind: str, count: int) -> Machine:
        """So many chips of a kind."""
        chip = CHIPS[kind]
        meant = topology.Described("cuda" if chip.capability else "tpu", chip.kind, chip.capability)
        return Machine(self.devices[:count], [meant], budget_of(chip), chip)

    def needs(
        self,
        task: SegmentationTask | UNetTask,
        architecture: Architecture,
        mesh: Mesh,
        kind: str,
    ) -> Needs:
        """The needs of an experiment on a mesh of chips of a kind.

        task: of shapes, with the kernels and microbatches of a run.
        """
        # What the cost of an image depends on, beside how it is computed.
        config, size = task.config, task.config.train.batch_size
        data, chip = config.data, CHIPS[kind]
        rate = mesh.size * chip.flops
        model = (config.model, config.diffusion, config.loss, data.image_size, data.num_queries)

        # Memory: state, frozen parts, this batch and the next one, and the step's own results.
        batch = programs.train_batch(task, architecture, size)
        rows = sum(math.prod(x.shape) * x.dtype.itemsize for x in batch.values())
        state = abstract_state(task.abstract, config.optim)
        memory = state_bytes(state, mesh) + state_bytes(task.frozen, mesh)
        memory += 2 * rows / programs.shards(mesh)
        with cuda.assumed_cudnn():
            memory += self._once(
                ("memory", *model, config.compute, size, mesh.shape),
                lambda: programs.temporary_bytes(task, architecture, mesh)[0],
            )

        # Time: a train step's FLOPs grow with its images.
        one = programs.train_batch(task, architecture, 1)
        image = self._once(("image", *model), lambda: step_flops(task, one))
        classes = registry.spec(data.name).num_classes
        cost_of_view = partial(self._view_flops, task, architecture)
        view = self._once(("view", *model, config.eval, classes), cost_of_view)
        views = registry.spec(data.name).splits[config.eval.split]
        return Needs(
            memory=memory,
            budget=budget_of(chip),
            microbatches=config.compute.accumulation,
            training=config.train.steps * size * image / rate,
            evaluation=views * view / rate,
        )

    def _view_flops(self, task: SegmentationTask | UNetTask, architecture: Architecture) -> float:
        """FLOPs of the evaluation's programs for one view, without kernels, whose FLOPs do not show."""
        plain = {"compute.attention": "plain", "compute.feed_forward": "plain", "compute.conv": "xla"}
        evaluation = plain | {"compile.program": "eval", "eval.batch_size": 1}
        shown = programs.abstract_task(with_settings(task.config, evaluation), architecture)
        assert isinstance(shown, SegmentationTask)  # the U-Net alone is a train step
        alone = make_mesh(MeshConfig(1, 1, 1), self.devices[:1])
        made = programs.trace_evaluation(shown, architecture, alone, 1)
        called = ((p.traced.jaxpr.jaxpr, p.calls / p.images) for p in made)
        return sum(traced_flops(jaxpr) * calls for jaxpr, calls in called)

    def _once(self, key: Sequence[Any], count: Callable[[], float]) -> float:
        """A number, counted at the first call with this key."""
        name = repr(key)
        if name not in self._known:
            self._known[name] = count()
        return self._known[name]


def table(paths: Sequence[str]) -> str:
    """The table in Markdown: a row for each configuration file."""
    most = max(count for _, _, count in DEVICES)
    counter = Counter(topology.simulated(f"cpu:{most}", most))
    lines = [f"| | {' | '.join(title for title, _, _ in DEVICES)} |", "|---" * (len(DEVICES) + 1) + "|"]
    for path in paths:
        config = load_config(path)
        architecture = Architecture.of(config.model)
        build = partial(programs.abstract_task, architecture=architecture)
        cells = []
        for _, kind, count in DEVICES:
            setup = set_up(config, build, counter.machine(kind, count))
            needs = counter.needs(build(setup.config), architecture, setup.mesh, kind)
            cells.append(str(needs))
        lines.append(f"| {Path(path).name} | {' | '.join(cells)} |")
        log.info("%s", lines[-1])
    return "\n".join(lines) + "\n"


def insert(text: str, page: str) -> str:
    """A page with `text` in place of what stands between its marks.

    Raises:
      UserError: no such marks.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"--into: no place for the table; it goes between {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{text}{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m digseg_jax.tools.hardware_table", description=__doc__
    )
    parser.add_argument("configs", nargs="+", help="configuration files")
    parser.add_argument("--into", type=Path, help="a file with a place for the table; default: stdout")
    arguments = parser.parse_args(argv)

    def write() -> None:
        setup_log()
        jax.config.update("jax_platforms", "cpu")

        # Check the page's place for the table before the minutes that the table takes.
        page = arguments.into.read_text(encoding="utf-8") if arguments.into else ""
        insert("", page or BEGIN + END)
        made = table(arguments.configs)
        if arguments.into:
            arguments.into.write_text(insert(made, page), encoding="utf-8")
        else:
            print(made, end="")

    return run_tool(write)


if __name__ == "__main__":
    sys.exit(main())
