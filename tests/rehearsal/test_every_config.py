# SPDX-License-Identifier: Apache-2.0
"""Every file in configs/ and every version after the colon: pytest -m rehearsal.

Every pair of the two is trained, killed, resumed, evaluated, exported, used to predict, and read by
torch. What does not depend on the pair (one device, decoders, suite, --mode=export, palette) is done
for every file with the first version, and for every version with the first file.

Compilation is most of it: stories of one version share their programs, and JAX_COMPILATION_CACHE_DIR
keeps them for the next session.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from digseg_jax.recipes import RECIPES, VERSIONS
from digseg_jax.segmentation.palette import MAX_CLASSES
from rehearsal import story

CONFIGS = {path.stem for path in (Path(__file__).parents[2] / "configs").glob("*.py")}
ON_LAND_COVER = ("quickstart", "landcover", "landcover_palette", "landcover_prompted")
NO_MASKS = ("landcover_prior", "landcover_vae")
FIRST_VERSION, FIRST_NAME = "sd15", "phenobench"
PUBLIC = sorted(CONFIGS - {*ON_LAND_COVER, *NO_MASKS, *story.MIXED})
pytestmark = pytest.mark.rehearsal


def played(run: story.Run) -> None:
    """Prints the times of a run's commands and of all of them, for the record."""
    parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in run.spent.items())
    print(f"\n{run.config[9:]}: {sum(run.spent.values()):.0f} s ({parts})")


# each configuration once, before the other versions; of those with another diffusion one data set each
@pytest.mark.parametrize(
    ("version", "name"),
    [(version, name) for version in VERSIONS for name in PUBLIC]
    + [(recipe, FIRST_NAME) for recipe in RECIPES],
)
def test_a_public_data_set(stage, tmp_path, version, name):
    run = story.Run(stage, tmp_path, name, version)
    once = version == FIRST_VERSION or name == FIRST_NAME
    (story.play_whole if once else story.play)(run)
    played(run)


@pytest.mark.parametrize(
    ("version", "name"),
    [(FIRST_VERSION, name) for name in PUBLIC if story.DATASETS[name].classes <= MAX_CLASSES]
    + [(version, FIRST_NAME) for version in VERSIONS if version != FIRST_VERSION],
)
def test_a_palette(stage, tmp_path, version, name):
    run = story.Run(stage, tmp_path, name, version)
    story.paint_palette(run)
    played(run)


@pytest.mark.parametrize("version", ["sd15", "sd21", "biomedclip"])
def test_names_in_colors(stage, tmp_path, version):
    run = story.Run(stage, tmp_path, FIRST_NAME, version)
    story.paint_names(run)
    played(run)


def test_the_papers_tables(stage, tmp_path):
    run = story.Run(stage, tmp_path, "coco_stuff", "sd15")
    run.do(story.FOUR, name="train")
    story.evaluate_tables(run)
    played(run)


@pytest.mark.parametrize(
    ("name", "version"),
    [("camvid", "palette"), ("camvid", "binary"), ("folder", "small")]
    + [(name, "") for name in ON_LAND_COVER],
)
def test_a_small_model(request, stage, tmp_path, name, version):
    if name in ON_LAND_COVER:
        request.getfixturevalue("cover")
    run = story.Run(stage, tmp_path, name, version)
    story.play_whole(run)
    played(run)


@pytest.mark.parametrize("name", NO_MASKS)
@pytest.mark.usefixtures("cover")
def test_what_the_small_models_are_made_of(stage, tmp_path, name):
    run = story.Run(stage, tmp_path, name)
    story.kill_and_resume(run)
    story.export_again(run)
    played(run)


@pytest.mark.parametrize(
    ("name", "version"), [(name, version) for name in story.MIXED for version in ("all", "shareable")]
)
@pytest.mark.usefixtures("cover")
def test_a_mixture(stage, tmp_path, name, version):
    run = story.Run(stage, tmp_path, name, version)
    story.kill_and_resume(run)
    if run.segments:
        story.predict(run)
        story.evaluate_domains(run, "camvid", "photos_voc")
    story.export_again(run)
    played(run)
