# SPDX-License-Identifier: Apache-2.0
"""One configuration the whole way on two processes with two devices each, as on a pod."""

from __future__ import annotations

import numpy as np
import pod
import pytest
from safetensors.numpy import load_file

from rehearsal import story
from rehearsal.export_check import check_export

pytestmark = pytest.mark.rehearsal
SPEED = ("seconds", "per_second")  # parts of the names of figures that differ from run to run


def on_two(run: story.Run, name: str, *arguments: str) -> pod.Pod:
    """Starts a command of the run on two processes."""
    flags = run.command(story.FOUR, *arguments)
    return pod.Pod(run.folder / name, flags, 2, 2, env=run.stage.env)


def without_speed(value):
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not any(part in k for part in SPEED)}
        return {key: without_speed(item) for key, item in kept.items()}
    return [without_speed(item) for item in value] if isinstance(value, list) else value


def test_killed_resumed_and_evaluated(stage, tmp_path):
    run = story.Run(stage, tmp_path, "phenobench", "sd15")

    # Both are killed between two saves, and go on.
    processes = on_two(run, "killed")
    processes.when(lambda: story.EVERY in pod.checkpoints(run.workdir))
    processes.kill()
    before = pod.losses(run.workdir)
    on_two(run, "resumed").check()
    after = pod.losses(run.workdir)
    assert list(after) == list(range(1, story.STEPS + 1))
    assert {step: after[step] for step in before} == before
    story.check_results(run)

    # One process with as many devices counts the same pixels.
    counted = run.confusion()
    run.do(story.FOUR, "--mode=eval", name="eval")
    np.testing.assert_array_equal(run.confusion(), counted)

    # The suite is shared by the processes, not done by each.
    suite = f"--suite={run.dataset.suite}", f"--config.data.root={run.root.parent}"
    on_two(run, "suite", "--mode=eval", *suite).check()
    file = f"suite_{run.dataset.suite}.json"
    together = run.results(file)
    (run.workdir / "eval" / "journal").rename(run.workdir / "eval" / "journal_of_two")
    run.do(story.FOUR, "--mode=eval", *suite, name="suite")
    assert without_speed(run.results(file)) == without_speed(together)

    story.predict(run)

    # By processes that store and split arrays from the same size on as those that trained.
    weights = run.workdir / "export" / "unet" / story.WEIGHTS
    trained = load_file(weights)
    weights.unlink()
    on_two(run, "export", "--mode=export").check()
    exported = load_file(weights)
    assert exported.keys() == trained.keys()
    for key, tensor in trained.items():
        np.testing.assert_array_equal(exported[key], tensor, err_msg=key)
    check_export(run.workdir / "export")
