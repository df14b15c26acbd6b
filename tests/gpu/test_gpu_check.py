# SPDX-License-Identifier: Apache-2.0
"""The check of a GPU runs here too, with few channels, on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_all_its_stages_on_a_cpu(tmp_path):
    command = [
        sys.executable, "-m", "tests.gpu", "--tiny", f"--out={tmp_path}/gpu.json", f"--work={tmp_path}",
        "--minutes=30",
    ]  # fmt: skip
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["passed"] and result["attention"] == "headwise" and result["dtype"] == "bfloat16"
    assert result["evaluation"]["estep"] == "8x2" and result["train"]["report"]
    for stage in ("train", "evaluation", "predict"):
        assert result[stage]["images_per_second"] > 0
    # bfloat16 here too: near float32, and not the same
    assert 0 < result["agreement"]["relative"]["loss"] < 2e-2
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]  # nothing is left behind
