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
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from digseg_jax.aot import cuda, programs, topology
from digseg_jax.aot.advice import state_bytes
from digseg_jax.aot.shapes import Architecture
from digseg_jax.config.experiment import load_config
from digseg_jax.config.schema import Config
from digseg_jax.data.datasets import registry
from digseg_jax.errors import UserError
from digseg_jax.log import log
from digseg_jax.log import setup as setup_log
from digseg_jax.runtime import gpu
from digseg_jax.runtime.door import run_tool
from digseg_jax.runtime.hardware import CHIPS
from digseg_jax.runtime.sharding import make_mesh
from digseg_jax.training.flops import traced_flops
from digseg_jax.training.mesh_choice import choose_accumulation, choose_mesh
from digseg_jax.training.step import abstract_state
from digseg_jax.training.tasks.parts import for_devices

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
        hours = f"{self.training / HOUR:.2g} + {self.evaluation / HOUR:.2g} h"
        return f"{memory} GB{parts}, {hours}"


class Counter:
    """Counts the needs of experiments; what several of them share is traced once.

    devices: simulated ones, as many as the largest slice has.
    """

    def __init__(self, devices: list[jax.Device]):
        self.devices = devices
        self._known: dict[str, float] = {}

    def needs(self, config: Config, kind: str, count: int) -> Needs:
        """The needs of an experiment on `count` chips of a kind."""
        # Configuration, mesh and microbatches as a run chooses them.
        chip, devices = CHIPS[kind], self.devices[:count]
        meant = topology.Described("cuda" if chip.capability else "tpu", chip.kind, chip.capability)
        reserved = (
            topology.RESERVED if not chip.capability else chip.hbm_bytes * (1 - gpu.memory_share())
        )
        budget = chip.hbm_bytes - reserved
        config = for_devices(config, [meant])
        architecture = Architecture.of(config.model)
        task, _ = programs.train_task(config, architecture, 1)
        mesh = make_mesh(choose_mesh(config, task, devices, budget, chip), devices)
        config = choose_accumulation(config, task, mesh, budget, chip)

        rate, train, settings = count * chip.flops, config.train, config.eval
        views = registry.spec(config.data.name).splits[settings.split]
        return Needs(
            memory=self._memory(config, architecture, mesh),
            budget=budget,
            microbatches=config.compute.accumulation,
            training=train.steps * train.batch_size * self._image_flops(config, architecture) / rate,
            evaluation=views * self._view_flops(config, architecture) / rate,
        )

    def _memory(self, config: Config, architecture: Architecture, mesh: Mesh) -> float:
        """Bytes of the train step on one device: state, frozen parts, two batches, temporaries."""
        task, batch = programs.train_task(config, architecture, programs.train_images(config, mesh))
        state = abstract_state(task.abstract, config.optim)
        rows = sum(math.prod(x.shape) * x.dtype.itemsize for x in batch.values())
        stored = state_bytes(state, mesh) + state_bytes(task.frozen, mesh)

        def temporaries() -> float:
            with cuda.assumed_cudnn():
                return programs.temporary_bytes(config, architecture, mesh)[0]

        key = ("memory", *_model(config), config.compute, config.train.batch_size, mesh.shape)
        return stored + 2 * rows / programs.shards(mesh) + self._once(key, temporaries)

    def _image_flops(self, config: Config, architecture: Architecture) -> float:
        """FLOPs of a train step for one image."""
        key = ("image", *_model(config))
        return self._once(key, lambda: programs.model_flops(config, architecture, 1))

    def _view_flops(self, config: Config, architecture: Architecture) -> float:
        """FLOPs of the evaluation's programs for one view, without kernels, whose FLOPs do not show."""
        changed: dict[str, Any] = {"attention": "plain", "feed_forward": "plain", "conv": "xla"}
        config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, **changed))

        def count() -> float:
            alone = make_mesh(dataclasses.replace(config.mesh, fsdp=1), self.devices[:1])
            made = programs.evaluation_programs(config, architecture, alone)
            return sum(
                traced_flops(p.traced.jaxpr.jaxpr) * p.calls / p.images for p in made if p.traced
            )

        classes = registry.spec(config.data.name).num_classes
        return self._once(("view", *_model(config), config.eval, classes), count)

    def _once(self, key: Sequence[Any], count: Callable[[], float]) -> float:
        """A number, counted at the first call with this key."""
        name = repr(key)
        if name not in self._known:
            self._known[name] = count()
        return self._known[name]


def _model(config: Config) -> tuple[Any, ...]:
    """What the cost of an image depends on, beside how it is computed."""
    return config.model, config.diffusion, config.loss, config.data.image_size, config.data.num_queries


def table(paths: Sequence[str]) -> str:
    """The table in Markdown: a row for each configuration file."""
    most = max(count for _, _, count in DEVICES)
    counter = Counter(topology.simulated(f"cpu:{most}", most))
    lines = [f"| | {' | '.join(title for title, _, _ in DEVICES)} |", "|---" * (len(DEVICES) + 1) + "|"]
    for path in paths:
        config = load_config(path)
        cells = [str(counter.needs(config, kind, count)) for _, kind, count in DEVICES]
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

        # A page without a place for the table is told before the minutes that it takes.
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
