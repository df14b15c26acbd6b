# SPDX-License-Identifier: Apache-2.0
"""An experiment file for every data set, each from every version of the recipes."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
from absl import flags
from experiments import CONFIGS, get_config
from ml_collections import config_flags

from digseg_jax.aot.shapes import Architecture
from digseg_jax.config.parse import parse
from digseg_jax.config.schema import Config, DataConfig
from digseg_jax.data.datasets import registry
from digseg_jax.data.datasets.domains import DOMAINS
from digseg_jax.errors import UserError
from digseg_jax.recipes import RECIPES, VERSIONS, stable_diffusion
from digseg_jax.training.tasks.parts import Vae, check_size
from digseg_jax.weights.catalog import find, hub_id
from digseg_jax.weights.hub import _HUB_ID

OTHERS = {
    "landcover",
    "landcover_igbp",
    "pascal_voc_21",
}  # the last is a part of the generalist's mixture
FROM_FILES = sorted(set(registry.names()) - OTHERS)
SMALL = {"camvid": ("palette", "binary")}  # these start from shipped weights by default


@pytest.mark.parametrize("name", FROM_FILES)
def test_every_data_set_has_its_file(name):
    config = parse(get_config(name, "sd21"))
    assert config.data.name == name
    assert name in SMALL or config == parse(get_config(name))
    if name != "folder":
        assert config.eval.split == registry.spec(name).eval_split
        assert config.eval.split in registry.spec(name).splits
    other = parse(get_config(name, "sd15"))
    assert other.model != config.model and other.data == config.data
    for version in VERSIONS:
        model = parse(get_config(name, version)).model
        assert all(_HUB_ID.fullmatch(part) for part in (model.vae, model.unet, model.text))
        assert model.mask_padding == find(model.text).masks_padding == (version == "biomedclip")


@pytest.mark.parametrize("name", ["ade20k", "monuseg"])
def test_a_recipe_differs_from_its_checkpoints_version_in_the_diffusion_alone(name):
    for recipe, same in (("sd15_epsilon", "sd15"), ("marigold_recipe", "sd21")):
        ours, other = parse(get_config(name, recipe)), parse(get_config(name, same))
        assert ours.diffusion != other.diffusion
        assert ours.loss.x0_weight == (recipe == "sd15_epsilon")
        assert dataclasses.replace(ours, diffusion=other.diffusion, loss=other.loss) == other
    marigold = [recipe for recipe in RECIPES if recipe.startswith("marigold")]
    uniform = [parse(get_config(name, recipe)).diffusion for recipe in marigold]
    assert [d.zero_snr for d in uniform] == [True, False]
    assert {(d.timestep_sampling, d.noise) for d in uniform} == {("uniform", "multires")}
    # Ours draws half of the timesteps where the sampler of two steps is; Marigold's are all uniform.
    shares = [parse(get_config(name, v)).diffusion.sampler_share for v in ("sd21", "vitb16", *marigold)]
    assert shares == [0.5, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("version", ["vitb16", "biomedclip", "sd15_epsilon"])
def test_where_the_text_is_new_to_it_stable_diffusion_15_keeps_its_own_target(version):
    config = parse(get_config("monuseg", version))
    assert (config.diffusion.prediction_type, config.diffusion.zero_snr) == ("epsilon", False)
    assert config.loss.x0_weight == 1.0


def test_the_parallel_recipe_differs_from_its_checkpoints_version_in_the_text_alone():
    ours, other = (parse(get_config("monuseg", version)) for version in ("sd21_clip", "sd21"))
    assert (ours.model.text_injection, other.model.text_injection) == ("parallel", "adapter")
    model = dataclasses.replace(ours.model, text=other.model.text, text_injection="adapter")
    assert dataclasses.replace(ours, model=model) == other

    # --mode=compile knows the pathway's shapes without any file.
    unet, width = tiny.shapes_of(ours, prompts=1).unet, Architecture.of(ours.model).text_width
    assert (unet.prompt_length, unet.text_dim, width) == (77, 768, 768)
    assert unet.cross_attention_dim == unet.text_features == 1024


@pytest.mark.parametrize("name", FROM_FILES)
def test_every_recipe_looks_at_few_images_while_it_trains(name):
    config = parse(get_config(name, "sd15"))
    assert 0 < config.logging.eval_every < config.train.steps / 5
    assert 0 < config.logging.eval_images <= 16


@pytest.mark.parametrize("name", FROM_FILES)
def test_crops_and_views_are_of_sizes_that_the_models_halve(name):
    for version in (*VERSIONS, *SMALL.get(name, ())):
        config = parse(get_config(name, version))
        architecture = Architecture.of(config.model)
        parts = Vae(None, architecture.vae), architecture.unet
        check_size("data.image_size", config.data.image_size, *parts)
        check_size("eval.view_size", config.eval.view_size, *parts)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # ml_collections loads files its own way
def test_the_version_comes_after_the_colon_of_the_flag():
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    values(["x", f"--config={CONFIGS}/ade20k.py:sd21"])
    assert parse(values.config).model.unet == f"{hub_id('sd-2.1')}:unet"


@pytest.mark.parametrize("name", SMALL)
def test_a_small_recipe_needs_no_hub(name):
    assert get_config(name).to_dict() == get_config(name, SMALL[name][0]).to_dict()
    for version in SMALL[name]:
        model = parse(get_config(name, version)).model
        assert model.unet.startswith("assets:") and model.vae.startswith("assets:")


@pytest.mark.parametrize("domain", DOMAINS, ids=lambda domain: domain.name)
def test_a_specialist_has_the_crops_of_its_domain_and_its_part_of_the_steps(domain):
    generalist, specialist = (parse(get_config("generalist", v)) for v in ("all", domain.name))
    (part,) = specialist.data.mixture
    assert part in generalist.data.mixture
    assert specialist.data.foreign_rate == 0 < generalist.data.foreign_rate
    assert specialist.train.steps * len(DOMAINS) == generalist.train.steps
    assert specialist.model == generalist.model and specialist.loss == generalist.loss


def test_another_version_is_refused_with_the_legal_ones():
    with pytest.raises(
        UserError, match="'sd14'.*sd15, sd21, marigold, vitb16, biomedclip, sd15_epsilon"
    ):
        stable_diffusion("sd14", "ade20k")
    with pytest.raises(UserError, match="'sd14'.*sd15, sd21, .*marigold_recipe_v1, .*palette, binary$"):
        get_config("camvid", "sd14")
    with pytest.raises(UserError, match="'sd14'.*all, shareable, photos_coco128, .*, landcover$"):
        get_config("generalist", "sd14")


def test_the_configuration_knows_exactly_the_registered_names():
    field = DataConfig.__dataclass_fields__["name"]
    assert sorted(field.metadata["names"]) == list(registry.names())
    assert Config().data.name == "landcover"
