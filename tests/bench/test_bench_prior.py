# SPDX-License-Identifier: Apache-2.0
"""The prior's benchmark: its file in RUN/bench becomes a table of the report."""

from __future__ import annotations

from digseg_jax.report.sections import bench_tables
from digseg_jax.viz.templates import render_part
from tests.bench.prior import as_table


def test_its_file_is_a_table_of_the_report():
    kinds = ("miou_mean", "miou_std", "accuracy_mean", "accuracy_std")
    result = {f"{start}_{k}": 0.25 for start in ("pretrained", "random") for k in kinds}
    table = as_table(result | {"steps": 250, "seeds": 3, "estep": "1x1"})
    assert all(len(row) == len(table["columns"]) for row in table["rows"])
    text = render_part("report/sections.html.j2", "benches", bench_tables([table]))
    assert "from the prior" in text and "from scratch" in text and "250 steps" in text
