# SPDX-License-Identifier: Apache-2.0
"""The prompted codec's benchmark: what is compared, colors in another order, a table of the report."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from digseg_jax.report.sections import bench_tables
from digseg_jax.segmentation.prompted import PromptedCodec
from digseg_jax.viz.templates import render_part
from tests.bench import prompted


def test_each_codec_has_a_name_for_every_class_and_only_its_own_settings():
    for data, classes in (("landcover", 8), ("landcover_igbp", 17)):
        ours, other = (prompted.configuration(data, c, 1, 9, 0) for c in ("prompted", "binary"))
        assert ours.data.num_queries == classes and other.data.num_queries == 2
        assert (ours.seed, ours.train, ours.optim) == (other.seed, other.train, other.optim)


def test_permuted_colors_are_the_same_colors_and_the_background_stays():
    codec = PromptedCodec(8)
    codec.assume(4)
    state = codec.state() | {"colors": np.arange(27.0).reshape(9, 3).tolist()}
    codec.restore(state)
    other = prompted.permuted(SimpleNamespace(codec=codec), 0).codec
    before, after = (
        np.concatenate([c.palette.colors, c.color_latents], axis=1) for c in (codec, other)
    )
    assert sorted(map(tuple, after)) == sorted(map(tuple, before)) and (after != before).any()
    np.testing.assert_array_equal(after[-1], before[-1])
    np.testing.assert_array_equal(codec.palette.colors, state["colors"])  # the task's own is untouched


def test_ratios_are_those_of_the_best_decoders():
    def row(miou, seconds, sea):
        return {"miou": miou, "seconds": seconds, "per_class": dict.fromkeys(prompted.UNSEEN, sea)}

    ours = {"vae": row(0.3, 1.0, 0.2), "probe": row(0.4, 0.5, 0.5), "best": "probe"}
    ours["unseen names"] = row(0.4, 0.5, 0.4)
    other = {"vae": row(0.5, 5.0, 0.5), "probe": row(0.2, 4.0, 0.5), "best": "vae"}
    for estep in map(str, prompted.ENSEMBLES):
        ours[estep], other[estep] = row(0.6, 1.0, 0.5), row(0.5, 1.0, 0.5)
    found = prompted.ratios({"prompted": ours, "binary": other})
    wanted = {"miou": 0.8, "seconds": 0.1, "miou, 8x1": 1.2, "miou, 8x2": 1.2}
    wanted["kept by unseen names"] = 0.8
    assert found == pytest.approx({f"ratio of {name}": value for name, value in wanted.items()})


def test_its_file_is_a_table_of_the_report():
    row = {"miou": 0.25, "accuracy": 0.5, "seconds": 0.1}
    runs = {"landcover, prompted": [{"vae": row, "permuted": row}, {"vae": row, "permuted": row}]}
    steps = {"landcover": {"binary": 300, "prompted": 550}}
    table = prompted.as_table({"runs": runs, "steps": steps, "seeds": 2, "estep": "1x1"})
    assert table["rows"][1] == ["landcover, prompted", 550, "permuted", 0.25, 0.0, 0.5, 0.1]
    assert "permuted" in render_part("report/sections.html.j2", "benches", bench_tables([table]))
