# SPDX-License-Identifier: Apache-2.0
"""What is written beside exported weights, and what is refused because of it."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tiny

from digseg_jax import assets, jobs
from digseg_jax.config.parse import parse, to_dict
from digseg_jax.config.schema import Config
from digseg_jax.errors import UserError
from digseg_jax.models import functional
from digseg_jax.prediction.description import (
    BINDING,
    FILE,
    FrozenPart,
    check_agreement,
    checksum,
    describe,
    find_export,
    read_description,
    write_description,
)
from digseg_jax.tools.ship_assets import describe_shipped
from digseg_jax.weights import catalog, load_component, read_metadata

OTHER = {  # a legal value of each binding setting that is not the tiny configuration's
    "data.image_size": 64,
    "data.scale_unit": "short_side",
    "data.scale_min": 0.9,
    "data.scale_max": 1.5,
    "data.templates": ("a photo of {}",),
    "model.codec": "palette",
    "diffusion.prediction_type": "sample",
    "diffusion.zero_snr": False,
    "model.text_skip_layers": 1,
    "model.max_tokens": 12,
    "model.mask_padding": False,
    "model.sentence_token": False,
    "model.text_adapters": False,
    "model.text_injection": "parallel",
}


@pytest.fixture
def config(folders):
    return tiny.config(folders)


@pytest.fixture
def made(config):
    return described(config)


def described(config, steps=7):
    shapes = {"a": jax.ShapeDtypeStruct((3, 4), "float32"), "b": jax.ShapeDtypeStruct((5,), "float32")}
    return describe(config, shapes, steps, f"checkpoints/{steps}")


def changed(config, key, value):
    tree = to_dict(config)
    section, name = key.split(".")
    tree[section][name] = value
    return parse(tree)


def refusal(made, config) -> str:
    with pytest.raises(UserError) as caught:
        check_agreement(made, to_dict(config), "weights")
    return tiny.one_line(caught.value)


def test_it_reads_what_it_wrote(made, tmp_path):
    write_description(tmp_path, made)
    assert read_description(tmp_path) == made
    assert made.parameters == 17 and made.steps == 7 and made.datasets == ["landcover"]
    assert made.classes[0] == "water" and made.versions.keys() >= {"digseg_jax", "jax", "numpy"}


def test_a_part_inside_the_folder_moves_with_it(config, tmp_path):
    """The file then holds no path of the machine that wrote it; another part keeps its own."""
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(config.model.vae, first / "vae")
    inside = changed(config, "model.vae", str(first / "vae"))
    write_description(first, described(inside))
    text = (first / FILE).read_text()
    assert str(first) not in text and '"./vae"' in text

    first.rename(second)
    read = read_description(second)
    assert read.vae.reference == str(second / "vae") and read.text.reference == config.model.text
    assert read.training_config().model.vae == str(second / "vae")
    check_agreement(read, to_dict(read.training_config()), second)


def test_a_file_from_before_a_setting_means_what_every_run_had_then(made, tmp_path):
    write_description(tmp_path, made)
    file = tmp_path / FILE
    values = json.loads(file.read_text())
    del values["config"]["model"]["text_injection"]
    file.write_text(json.dumps(values))
    assert read_description(tmp_path).recorded_config() == made.recorded_config()
    assert read_description(tmp_path).recorded_config().model.text_injection == "adapter"


def test_the_words_of_a_training_are_its_classes_and_their_synonyms(made, tmp_path):
    assert "open water" in made.synonyms and not set(made.synonyms) & set(made.classes)
    write_description(tmp_path, made)
    values = json.loads((tmp_path / FILE).read_text())
    del values["synonyms"]  # as earlier versions wrote it
    (tmp_path / FILE).write_text(json.dumps(values))
    assert read_description(tmp_path) == dataclasses.replace(made, synonyms=[])


def test_every_binding_setting_has_another_value_here():
    assert tuple(OTHER) == BINDING


@pytest.mark.parametrize("key", BINDING)
def test_a_contradiction_names_the_key_both_values_and_what_to_do(key, config, made):
    check_agreement(made, to_dict(config), "weights")
    trained = to_dict(config)[key.split(".")[0]][key.split(".")[1]]
    other = changed(config, key, OTHER[key])
    asked = to_dict(other)[key.split(".")[0]][key.split(".")[1]]
    message = refusal(made, other)
    assert f"config.{key}={asked!r}, trained with {trained!r}" in message
    assert "use the configuration of the training" in message


def test_two_contradictions_are_one_line(config, made):
    other = changed(changed(config, "data.image_size", 64), "model.max_tokens", 9)
    message = refusal(made, other)
    assert "config.data.image_size=64" in message and "config.model.max_tokens=9" in message


def test_what_does_not_change_the_masks_meaning_is_free(config, made):
    for key, value in (("eval.ensemble", 5), ("train.steps", 9), ("data.name", "camvid"),
                       ("model.dtype", "bfloat16"), ("data.num_queries", 7)):  # fmt: skip
        check_agreement(made, to_dict(changed(config, key, value)), "weights")


def test_a_palette_belongs_to_its_class_list(config):
    palette = changed(config, "model.codec", "palette")
    other = changed(palette, "data.name", "camvid")
    assert "config.data.name='camvid', trained with 'landcover'" in refusal(described(palette), other)


@pytest.mark.parametrize("part", ["vae", "text"])
def test_a_copied_part_is_the_same_and_another_one_is_not(part, folders, config, made, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(folders[part], copy)
    moved = changed(config, f"model.{part}", str(copy))
    check_agreement(made, to_dict(moved), "weights")
    weights = next(copy.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert f"config.model.{part}={str(copy)!r} has other weights" in refusal(made, moved)


def test_a_part_in_the_hubs_cache_that_is_named_by_its_path_is_a_folder(config, tmp_path):
    """As `hf download` prints it."""
    place = tmp_path / "hub/models--org--a/snapshots" / ("0123456789" * 4) / "vae"
    shutil.copytree(config.model.vae, place)
    found = FrozenPart.find(str(place))
    assert (found.reference, found.revision, found.pinned) == (str(place), "", str(place))


def test_a_hub_part_is_asked_for_at_its_commit():
    commit = "0123456789" * 4
    assert FrozenPart("org/a:vae", commit, "").pinned == f"org/a@{commit}:vae"
    assert FrozenPart("org/a@fp16:vae", commit, "").pinned == f"org/a@{commit}:vae"  # it may move
    assert FrozenPart("sd-1.5:vae", commit, "").pinned.endswith(f"@{commit}:vae")
    assert FrozenPart("minilm", "", "").pinned == "minilm"


def test_the_part_that_a_configuration_names_is_the_commit_of_the_training(config, made):
    commit = "0123456789" * 4
    hub = dataclasses.replace(made, vae=FrozenPart("sd-1.5:vae", commit, ""))
    pinned = hub.with_pinned_parts(changed(config, "model.vae", catalog.expand("sd-1.5:vae")).model)
    assert pinned.vae == f"{catalog.hub_id('sd-1.5')}@{commit}:vae"
    assert hub.with_pinned_parts(config.model) == config.model  # another one stays as it is


def test_the_configuration_of_the_training_comes_back(config, made):
    again = made.training_config()
    check_agreement(made, to_dict(again), "weights")
    assert (again.eval.ensemble, again.eval.steps) == (config.eval.ensemble, config.eval.steps)


def test_the_model_of_a_gate_is_the_evaluations_own(config):
    made = described(changed(config, "eval.presence_model", "/home/me/clip"))
    assert "/home/me" not in str(made)
    assert not made.training_config().eval.presence_model


def test_a_part_that_is_not_here_is_named(config, made, tmp_path):
    gone = dataclasses.replace(made, vae=FrozenPart(str(tmp_path / "gone"), "", ""))
    with pytest.raises(UserError) as caught:
        gone.training_config()
    assert "--config.model.vae=FOLDER" in tiny.one_line(caught.value)


def earlier(made):
    """The file as an earlier version wrote it: other names, and keys that are constants now."""
    values = json.loads(json.dumps(dataclasses.asdict(made)))
    sections = values["config"]
    sections["segmentation"] = {"codec": sections["model"].pop("codec")}
    sections["data"]["train_split"] = sections["data"].pop("split")
    sections["diffusion"] |= {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}
    sections["eval"]["gallery"] = 3
    return values


def test_an_earlier_versions_file_is_read(made, tmp_path):
    (tmp_path / FILE).write_text(json.dumps(earlier(made)))
    assert read_description(tmp_path) == made


def test_an_earlier_versions_file_of_another_schedule_is_refused(made, tmp_path):
    values = earlier(made)
    values["config"]["diffusion"]["beta_end"] = 0.02
    (tmp_path / FILE).write_text(json.dumps(values))
    with pytest.raises(UserError, match="diffusion.beta_end is no longer a setting: it is 0.012"):
        read_description(tmp_path)


def test_a_suggestion_may_be_absent(made, tmp_path):
    values = json.loads(json.dumps(dataclasses.asdict(made)))
    del values["config"]["eval"]
    (tmp_path / FILE).write_text(json.dumps(values))
    assert read_description(tmp_path).training_config().eval == Config().eval


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda v: v.pop("parameters"), "parameters missing"),
        (lambda v: v.update(schema=2), "schema=2, this program reads 1"),
        (lambda v: v.update(extra=1), "'extra' is not one of its keys"),
        (lambda v: v.update(steps="7"), "steps='7': expected int"),
        (lambda v: v.update(seed=True), "seed=True: expected int"),
        (lambda v: v["vae"].pop("sha256"), "vae: sha256 missing"),
        (lambda v: v["config"]["data"].pop("image_size"), "config.data.image_size is missing"),
        (lambda v: v["config"]["diffusion"].update(prediction_type="u"), "legal values are v_pred"),
        (lambda v: v["config"]["data"].update(image_size="64"), "expected int"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_line(change, told, made, tmp_path):
    values = json.loads(json.dumps(dataclasses.asdict(made)))
    change(values)
    (tmp_path / FILE).write_text(json.dumps(values))
    with pytest.raises(UserError) as caught:
        read_description(tmp_path)
    line = tiny.one_line(caught.value)
    assert line.startswith(str(tmp_path / FILE)) and told in line


@pytest.mark.parametrize(
    ("text", "told"), [(None, "missing"), ("{", "not readable as JSON"), ("[]", "list")]
)
def test_no_file_or_no_object_is_one_line(text, told, tmp_path):
    if text is not None:
        (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError, match=told) as caught:
        read_description(tmp_path)
    tiny.one_line(caught.value)


class TestFindExport:
    """One way from every form of a name to the folder of the weights."""

    def test_a_run_its_export_and_a_shipped_name(self, config, tmp_path):
        tiny.export(config, tmp_path / "run" / "export")
        (tmp_path / "run" / "config.json").write_text("{}")
        assert find_export(str(tmp_path / "run")) == tmp_path / "run" / "export"
        assert find_export(str(tmp_path / "run" / "export")) == tmp_path / "run" / "export"
        assert find_export("assets:segmenter") == assets.FOLDER / "segmenter"

    @pytest.mark.parametrize(
        ("name", "told"), [("", "run --mode=train first"), ("gone", "no such folder"),
                           ("assets:no", "legal: assets:")],
    )  # fmt: skip
    def test_nothing_there_is_one_line(self, name, told, tmp_path):
        with pytest.raises(UserError, match=told) as caught:
            find_export(name if ":" in name else str(tmp_path / name))
        tiny.one_line(caught.value)


def test_evaluation_refuses_another_configuration_before_anything_is_written(config, tmp_path):
    tiny.export(config, tmp_path / "export")
    other = changed(config, "diffusion.prediction_type", "sample")
    for accept in (False, True):
        with pytest.raises(UserError, match="prediction_type='sample', trained with 'v_prediction'"):
            jobs.evaluate(tmp_path, config=other, accept_changes=accept)
    (tmp_path / "export" / FILE).unlink()
    with pytest.raises(UserError, match="--mode=export"):
        jobs.evaluate(tmp_path, config=config)
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_a_suite_refuses_another_configuration(config, tmp_path):
    tiny.export(config, tmp_path / "export")
    with pytest.raises(UserError, match="max_tokens=9, trained with 20"):
        jobs.evaluate(tmp_path, "phenobench", config=changed(config, "model.max_tokens", 9))


class TestShipped:
    """The segmenter in the package, and the tool that describes it."""

    def test_the_file_is_what_the_tool_writes(self, tmp_path, monkeypatch):
        shutil.copytree(assets.FOLDER / "segmenter", tmp_path / "segmenter")
        (tmp_path / "segmenter" / FILE).unlink()
        monkeypatch.setattr("digseg_jax.tools.ship_assets.FOLDER", tmp_path)
        try:
            describe_shipped("segmenter")
        except UserError as error:
            if "not installed" not in str(error):
                raise
            pytest.skip(str(error))
        stored = read_description(assets.FOLDER / "segmenter")
        assert read_description(tmp_path / "segmenter") == stored

    def test_its_numbers_are_those_of_the_weights(self):
        folder = assets.FOLDER / "segmenter"
        stored = read_description(folder)
        leaves = jax.tree.leaves(functional.split(load_component(folder))[1])
        assert stored.parameters == sum(np.size(leaf) for leaf in leaves)
        assert stored.steps == int(read_metadata(folder)["steps"])
        assert stored.vae.sha256 == checksum(assets.FOLDER / "vae")
