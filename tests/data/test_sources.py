# SPDX-License-Identifier: Apache-2.0
"""Which splits a run opens before anything expensive is loaded."""

from __future__ import annotations

import official_trees
import pytest
from experiments import CONFIGS, get_config
from rehearsal import trees

from digseg_jax.config.parse import parse
from digseg_jax.data.sources import check_scored_splits, check_training_data, validation_split


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
