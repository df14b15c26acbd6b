# SPDX-License-Identifier: Apache-2.0
"""The configuration: what is wrong is refused at the start, by name and with the legal values."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
from pathlib import Path

import pytest
from tiny import one_line

from digseg_jax.config.parse import default, parse, sampling_settings, to_dict, with_settings
from digseg_jax.config.schema import Config, settings
from digseg_jax.errors import UserError

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def refused(values) -> str:
    with pytest.raises(UserError) as caught:
        parse(values)
    return one_line(caught.value)


def test_defaults_parse_to_the_defaults():
    assert parse(default()) == Config()
    assert parse({}) == Config()


def test_an_unknown_key_is_answered_with_the_nearest_and_the_legal_ones():
    message = refused({"train": {"stepz": 3}})
    assert "config.train.stepz" in message and "did you mean 'steps'" in message
    assert "steps, batch_size" in message


def test_an_unknown_key_deep_inside_is_named_with_its_whole_path():
    assert "config.vae_arch.layers" in refused({"vae_arch": {"layers": 3}})


def test_the_default_config_is_locked():
    with pytest.raises((AttributeError, KeyError)):
        default().train.stepz = 3


@pytest.mark.parametrize(
    ("values", "key", "expected"),
    [
        ({"train": {"steps": "many"}}, "config.train.steps='many'", "expected int, got str"),
        ({"train": {"steps": 1.5}}, "config.train.steps=1.5", "expected int, got float"),
        ({"train": {"steps": True}}, "config.train.steps=True", "expected int, got bool"),
        ({"diffusion": {"zero_snr": 1}}, "config.diffusion.zero_snr=1", "expected bool, got int"),
        ({"optim": {"b2": False}}, "config.optim.b2=False", "expected float, got bool"),
        (
            {"optim": {"learning_rate": math.inf}},
            "config.optim.learning_rate=inf",
            "be a finite number",
        ),
        ({"eval": {"sweep": "4x2"}}, "config.eval.sweep='4x2'", "expected a list"),
        ({"eval": {"sweep": (4,)}}, "config.eval.sweep=4", "expected str, got int"),
        ({"model": {"vae": None}}, "config.model.vae=None", "expected str, got NoneType"),
        ({"data": 3}, "config.data=3", "expected a section"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(values, key, expected):
    message = refused(values)
    assert message.startswith(key) and expected in message


def test_an_int_may_stand_for_a_float_and_a_list_for_a_tuple():
    config = parse({"optim": {"clip_norm": 2}, "eval": {"sweep": ["4x2"]}})
    assert config.optim.clip_norm == 2.0 and isinstance(config.optim.clip_norm, float)
    assert config.eval.sweep == ("4x2",)


@pytest.mark.parametrize(
    ("values", "key", "legal"),
    [
        ({"task": "segment"}, "config.task='segment'", "segmentation, prior, autoencoder"),
        ({"loading": {"on_error": "ignore"}}, "config.loading.on_error", "raise, skip"),
        ({"diffusion": {"noise": "pink"}}, "config.diffusion.noise", "gaussian, multires"),
        ({"eval": {"spacing": "even"}}, "config.eval.spacing", "trailing, leading"),
        ({"data": {"negative_rate": 1.0}}, "config.data.negative_rate=1.0", "at least 0 and below 1"),
        ({"data": {"scale_unit": "meter"}}, "config.data.scale_unit", "short_side, pixel"),
        ({"train": {"batch_size": 0}}, "config.train.batch_size=0", "at least 1"),
        ({"checkpoint": {"every": 0}}, "config.checkpoint.every=0", "at least 1"),
        ({"train": {"steps": -1}}, "config.train.steps", "at least 0"),
        ({"eval": {"steps": 2000}}, "config.eval.steps=2000", "1000"),
        ({"eval": {"sweep": ["4by2"]}}, "'4by2'", "8x2"),
        ({"eval": {"sweep": ["1x2000"]}}, "1x2000", "1000"),
        ({"mesh": {"tensor": -2}}, "config.mesh.tensor=-2", "at least -1"),
        ({"mesh": {"fsdp": -2}}, "config.mesh.fsdp=-2", "at least -1"),
        ({"task": "autoencoder", "vae_arch": {"norm_num_groups": 0}}, "norm_num_groups=0", "least 1"),
        ({"task": "autoencoder", "vae_arch": {"layers_per_block": 0}}, "layers_per_block=0", "least 1"),
        ({"task": "autoencoder", "vae_arch": {"kl_weight": -0.1}}, "kl_weight=-0.1", "at least 0"),
        (
            {"task": "autoencoder", "vae_arch": {"block_out_channels": [8, 0]}},
            "config.vae_arch.block_out_channels=0",
            "at least 1",
        ),
        (
            {"task": "prior", "unet_arch": {"attention_head_dim": [2, -1]}},
            "config.unet_arch.attention_head_dim=-1",
            "at least 1",
        ),
        (
            {"task": "prior", "unet_arch": {"cross_attention_dim": 0}},
            "cross_attention_dim=0",
            "least 1",
        ),
    ],
)
def test_an_illegal_value_is_refused_with_what_is_legal(values, key, legal):
    message = refused(values)
    assert key in message and legal in message


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"task": "prior", "eval": {"ensemble": 4}}, "config.eval.ensemble=4: config.task='prior'"),
        ({"task": "prior", "logging": {"eval_every": 5}}, "config.logging.eval_every=5"),
        ({"task": "autoencoder", "diffusion": {"noise": "multires"}}, "only segmentation, prior"),
        ({"vae_arch": {"kl_weight": 1.0}}, "only autoencoder; leave it at 0.0005"),
        ({"unet_arch": {"norm_num_groups": 4}}, "config.unet_arch.norm_num_groups=4"),
        *(
            ({"task": "prior", "data": {key: value}}, f"config.data.{key}={value}: config.task='prior'")
            for key, value in {
                "text_noise": 0.1,
                "word_dropout": 0.1,
                "num_queries": 3,
                "negative_rate": 0.3,
                "templates": ("a {}",),
            }.items()
        ),
        *(
            ({"task": "autoencoder", section: {key: value}}, f"config.{section}.{key}={value}")
            for section, key, value in [
                ("data", "text_noise", 0.1),
                ("data", "word_dropout", 0.1),
                ("model", "max_tokens", 9),
                ("model", "text_adapters", False),
                ("model", "sentence_token", False),
            ]
        ),
    ],
)
def test_a_key_that_the_task_does_not_use_is_refused(values, expected):
    assert expected in refused(values)


@pytest.mark.parametrize("best", ["val_mious", "loss"])
def test_the_metric_of_the_best_checkpoint_is_checked_before_anything_is_trained(best):
    message = refused({"checkpoint": {"best": best}, "logging": {"eval_every": 5}})
    assert f"config.checkpoint.best='{best}': legal values are " in message and "val_miou" in message


@pytest.mark.parametrize("value", [-1, 2**32])
def test_a_seed_that_no_generator_takes_is_refused(value):
    assert f"config.seed={value}: must be at least 0 and at most" in refused({"seed": value})


@pytest.mark.parametrize("value", [float("nan"), -1.0, 0.0])
def test_a_number_that_satisfies_no_bound_is_refused_with_all_of_them(value):
    assert "must be above 0" in refused({"optim": {"learning_rate": value}})


def test_every_bound_holds_for_its_default():
    assert parse(to_dict(Config())) == Config()


def test_epsilon_prediction_needs_a_schedule_that_leaves_some_signal():
    message = refused({"diffusion": {"prediction_type": "epsilon", "zero_snr": True}})
    assert "prediction_type" in message and "zero_snr" in message and "v_prediction" in message
    config = parse({"diffusion": {"prediction_type": "epsilon", "zero_snr": False}})
    assert config.diffusion.prediction_type == "epsilon"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"model": {"unet_text": "clip-l14"}}, "does not use it, only parallel; leave it at ''"),
        (
            {"optim": {"cooldown_steps": 5}},
            "config.optim.cooldown_steps=5: config.optim.schedule='cosine' falls to its end by itself",
        ),
        (
            {"optim": {"schedule": "exponential", "final_scale": 0.0}},
            "config.optim.final_scale=0.0: an exponential decay never reaches 0",
        ),
        (
            {"model": {"unet_init": "random"}, "optim": {"new_lr_scale": 10.0}},
            "config.optim.new_lr_scale=10.0: config.model.unet_init='random' makes all parameters new",
        ),
    ],
)
def test_settings_of_what_a_checkpoint_lacks_need_it(values, expected):
    assert expected in refused(values)


def test_a_best_checkpoint_needs_a_measurement_before_the_end():
    values = {"checkpoint": {"best": "val_miou"}, "train": {"steps": 400}}
    for every in (0, 500):
        message = refused(values | {"logging": {"eval_every": every}})
        assert f"measures it while training: 1 to config.train.steps=400, not {every}" in message
    assert parse(values | {"logging": {"eval_every": 400}}).checkpoint.best == "val_miou"


def test_a_part_of_a_mixture_has_no_views_of_its_own_in_cached_latents():
    plain = {
        "latent_cache": "DIR",
        "scale_min": 1.0,
        "scale_max": 1.0,
        "class_share_cap": 1.0,
        "jitter": 0.0,
    }
    part = {"name": "folder", "folder": "roads"}
    assert parse({"data": plain | {"mixture": (part,)}}).data.latent_cache == "DIR"
    own = part | {"short_side": 240, "quarter_turns": True}
    message = refused({"data": plain | {"mixture": (part, own)}})
    assert "mixture, roads: short_side=240, quarter_turns=True: cached latents" in message


def test_a_part_of_a_mixture_is_named_by_its_place_or_its_name():
    whole, part = {"name": "landcover"}, {"name": "folder", "folder": "roads"}
    message = refused({"data": {"mixture": (whole, part | {"weight": 0.0})}})
    assert "config.data.mixture[1].weight=0.0" in message
    message = refused({"data": {"mixture": (whole, part | {"held_out": "*night"})}})
    assert "mixture, roads: held_out: '*night' is not a regular expression" in message


@pytest.mark.parametrize("mixture", [(), ({"name": "landcover"}, {"name": "camvid"})])
def test_names_of_other_parts_need_parts_that_lend_some(mixture):
    message = refused({"data": {"foreign_rate": 0.5, "mixture": mixture}})
    assert message.startswith("config.data.foreign_rate=0.5: names of other parts")


def test_the_scales_of_each_part_of_a_mixture_make_a_range():
    """With the bound that a part leaves to the section; it was drawn from the range turned round."""
    whole, high = {"name": "landcover"}, {"name": "folder", "folder": "roads", "scale_min": 3.0}
    message = refused({"data": {"mixture": (whole, high)}})
    assert message.startswith("config.data.mixture, roads: scale_min=3.0, scale_max=2.0 ")
    low = {"name": "landcover", "scale_max": 0.4}
    assert "landcover: scale_min=0.5, scale_max=0.4 " in refused({"data": {"mixture": (low,)}})
    parse({"data": {"mixture": (whole, high | {"scale_max": 4.0})}})
    parse({"data": {"mixture": (whole, high), "scale_max": 3.0}})


def test_every_key_does_something():
    """Each is read outside the schema, its rules and its parser: of an object, which is not `self`."""
    read = set()
    for path in (ROOT / "digseg_jax").rglob("*.py"):
        nodes = [] if path.parent.name == "config" else ast.walk(ast.parse(path.read_bytes()))
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                own = isinstance(node.value, ast.Name) and node.value.id == "self"
                read |= set() if own else {node.attr}
    assert [key for key in settings() if key.rsplit(".", 1)[-1] not in read] == []


def test_a_calibration_is_never_fitted_on_the_tiles_that_it_scores():
    message = refused({"eval": {"split": "val"}})
    assert "config.eval.split='val'" in message and "calibrate" in message
    assert parse({"eval": {"split": "val", "calibrate": False}}).eval.split == "val"
    assert parse({"eval": {"split": "val", "calibrate_split": "train"}}).eval.calibrate


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_experiment_file_parses(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    values = module.get_config()
    config = parse(values)
    assert config.train.steps > 0
    with pytest.raises((AttributeError, KeyError)):
        values.no_such_key = 1


def test_to_dict_survives_json_and_parse_takes_it_back():
    config = parse({"eval": {"sweep": ["1x1", "4x2:leading"]}, "seed": 7, "optim": {"b2": 0.5}})
    assert parse(json.loads(json.dumps(to_dict(config)))) == config


def test_a_config_is_immutable():
    with pytest.raises(AttributeError):
        Config().seed = 1


def test_an_estep_on_the_command_line_sets_its_three_settings():
    config = with_settings(parse({}), sampling_settings("20x50:leading"))
    assert (config.eval.ensemble, config.eval.steps, config.eval.spacing) == (20, 50, "leading")
    assert sampling_settings("8x2")["eval.spacing"] == "trailing"
    for wrong in ("8", "1x2000"):
        with pytest.raises(UserError) as caught:
            with_settings(parse({}), sampling_settings(wrong))
        assert "\n" not in str(caught.value)
