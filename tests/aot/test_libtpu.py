# SPDX-License-Identifier: Apache-2.0
"""A tiny step through the real TPU compiler, where it is installed (`pip install "jax[tpu]"`)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)
TINY = (  # widths that compile in a minute
    "--config.compute.attention=splash",
    "--config.model.dtype=bfloat16",
    "--config.mesh.fsdp=4",
    "--config.train.batch_size=4",
)


def compile_for(
    topology: str,
    workdir: Path,
    *flags: str,
    config: str = "quickstart.py",
    widths: tuple[str, ...] = TINY,
) -> subprocess.CompletedProcess:
    command = [
        sys.executable, "-m", "digseg_jax.main", f"--config={ROOT}/configs/{config}",
        "--mode=compile", f"--topology={topology}", f"--workdir={workdir}", *widths, *flags,
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_a_tiny_step_for_four_chips(tmp_path):
    done = compile_for("v5e:2x2", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "compile.json").read_text())
    assert result["chips"] == 4 and result["fits"] and result["device_kind"].startswith("TPU v5")
    assert result["roofline_images_per_second_per_chip"] > 0
    assert "all-gather" in result["collectives"]  # of the sharded parameters


@pytest.mark.slow  # minutes
@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--config.model.codec=palette", "--config.data.num_queries=1"),
        ("--config.compile.program=eval", "--config.compile.eval_queries=150"),
    ],
    ids=["train", "train_palette", "eval"],
)
def test_a_miniature_of_stable_diffusion_for_four_chips(sd15_folders, tmp_path, flags):
    """Its classes, levels, places of attention and 77 tokens, with what `auto` chooses on a TPU."""
    parts = [f"--config.model.{part}={sd15_folders[part]}" for part in ("unet", "vae", "text")]
    sizes = ["--config.data.image_size=64", "--config.train.batch_size=8", "--config.compile.effort=-1"]
    done = compile_for("v5e:2x2", tmp_path, *parts, *sizes, *flags, config="ade20k.py:sd15", widths=())
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("compile*.json")
    result = json.loads(file.read_text())
    assert (
        result["fits"] and result["chips"] == 4 and result["config"]["compute"]["attention"] == "splash"
    )
    names = {"sample", "read"} if "eval" in file.name else {"train"}
    assert names <= set(result.get("programs", {result["program"]: 0}))


@pytest.mark.slow  # minutes, for the search
def test_a_search_for_fast_convolutions_changes_no_number(tmp_path):
    """Hence the report is made without it."""
    results = []
    for tuned in (False, True):
        folder = tmp_path / str(tuned)
        done = compile_for(
            "v5e:2x2", folder, f"--config.compile.tuned={tuned}", "--config.compile.unet_only=True"
        )
        assert done.returncode == 0, done.stderr
        results.append(json.loads((folder / "compile.json").read_text()))
    free = {"tuned", "config", "compile_seconds", "lower_seconds"}
    untuned, tuned = ({k: v for k, v in r.items() if k not in free} for r in results)
    assert untuned == tuned and untuned["effort"] == 0.0


def test_too_large_a_batch_is_status_3_with_advice(tmp_path):
    done = compile_for("v5e:2x2", tmp_path, "--config.compile.per_device_batch=60000",
                       "--config.compile.unet_only=True", "--config.compile.advice=False",
                       "--config.compile.effort=-1.0")  # fmt: skip
    assert done.returncode == 3, done.stderr
    result = json.loads((tmp_path / "compile.json").read_text())
    assert not result["fits"] and result["hbm_peak_bytes"] > result["hbm_limit_bytes"]
    assert any("config.compile.per_device_batch=" in line for line in result["advice"])


def test_an_unknown_slice_is_refused_in_one_line(tmp_path):
    done = compile_for("v5e:3x7", tmp_path)
    assert done.returncode == 2
    assert "--topology=v5e:3x7" in done.stderr and "Traceback" not in done.stderr
