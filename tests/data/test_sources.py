# SPDX-License-Identifier: Apache-2.0
"""Which splits a run opens before anything expensive is loaded."""

from __future__ import annotations

import official_trees
import pytest
import tiny
from experiments import CONFIGS, get_config
from rehearsal import trees

from digseg_jax.config.parse import parse
from digseg_jax.config.schema import DataConfig
from digseg_jax.data.sources import check_scored_splits, check_training_data, validation_split
from digseg_jax.errors import UserError


@pytest.mark.parametrize(
    "name", sorted(n for n in official_trees.TREES if (CONFIGS / f"{n}.py").exists())
)
def test_every_public_configuration_finds_its_splits(name, tmp_path):
    """Also those of data sets without a val, whose look during training takes the scored split."""
    config = get_config(name)
    config.data.root = str(trees.write_tree(name, tmp_path / name))
    config = parse(config)
    check_training_data(config.data)
    check_scored_splits(config.data, config.eval, while_training=bool(config.logging.eval_every))
    without_val = {"deepglobe": "test", "monuseg": "test"}
    assert validation_split(config.data, config.eval.split) == without_val.get(name, "val")


def test_a_val_that_cannot_be_read_is_not_replaced_by_the_scored_split(tmp_path):
    official_trees.folder(tmp_path)
    data = DataConfig(name="folder", root=str(tmp_path))
    assert validation_split(data, "test") == "val"
    next((tmp_path / "masks" / "val").iterdir()).unlink()
    with pytest.raises(UserError) as caught:
        validation_split(data, "test")
    assert "without a label" in tiny.one_line(caught.value)
