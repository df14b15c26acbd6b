# SPDX-License-Identifier: Apache-2.0
"""Every file in configs/ and every version after the colon, the whole way: pytest -m rehearsal.

Minutes each; JAX_COMPILATION_CACHE_DIR keeps the programs of one session for the next.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from digseg_jax.recipes import VERSIONS
from rehearsal import story

CONFIGS = {path.stem for path in (Path(__file__).parents[2] / "configs").glob("*.py")}
ON_LAND_COVER = ("quickstart", "landcover", "landcover_palette")
NO_MASKS = ("landcover_prior", "landcover_vae")
PUBLIC = sorted(CONFIGS - {*ON_LAND_COVER, *NO_MASKS})
pytestmark = pytest.mark.rehearsal


def played(run: story.Run) -> None:
    """Prints the times of a run's commands and of all of them, for the record."""
    parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in run.spent.items())
    print(f"\n{run.config[9:]}: {sum(run.spent.values()):.0f} s ({parts})")


# each configuration once, before the other versions
@pytest.mark.parametrize(
    ("version", "name"), [(version, name) for version in VERSIONS for name in PUBLIC]
)
def test_a_public_data_set(stage, tmp_path, version, name):
    run = story.Run(stage, tmp_path, name, version)
    story.play(run)
    if version == "sd15":  # the other versions paint with the same autoencoders
        story.paint_palette(run)
    played(run)


def test_the_papers_tables(stage, tmp_path):
    run = story.Run(stage, tmp_path, "coco_stuff", "sd15")
    run.do(story.FOUR, name="train")
    story.evaluate_tables(run)
    played(run)


@pytest.mark.parametrize(
    ("name", "version"),
    [("camvid", "palette"), ("camvid", "binary")] + [(name, "") for name in ON_LAND_COVER],
)
def test_a_small_model(request, stage, tmp_path, name, version):
    if name in ON_LAND_COVER:
        request.getfixturevalue("cover")
    run = story.Run(stage, tmp_path, name, version)
    story.play(run)
    played(run)


@pytest.mark.parametrize("name", NO_MASKS)
@pytest.mark.usefixtures("cover")
def test_what_the_small_models_are_made_of(stage, tmp_path, name):
    run = story.Run(stage, tmp_path, name)
    story.kill_and_resume(run)
    story.export_again(run)
    played(run)
