# SPDX-License-Identifier: Apache-2.0
"""Weights and tokenizers as people have them on disk: what is there and what to type; nothing unpacks
without end."""

from __future__ import annotations

import gzip
import json
import time

import numpy as np
import pytest
import tiny

from digseg_jax.data.datasets.readers import polygons
from digseg_jax.errors import UserError
from digseg_jax.weights import load_config, safetensors_io, tokenizer_files
from digseg_jax.weights.hub import resolve, resolve_pipeline, resolve_tokenizer


def test_a_pickle_is_told_with_the_tool_that_converts_it(tmp_path):
    file = tmp_path / "v1-5-pruned-emaonly.ckpt"
    file.write_bytes(b"weights")
    with pytest.raises(UserError) as caught:
        resolve(str(file))
    assert f"{file}: not a .safetensors file, and pickles are" in tiny.one_line(caught.value)
    assert "from_single_file(FILE).save_pretrained(FOLDER)" in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("", "no weights are named"),
        ("sd-1.5/unet", "no such folder: sd-1.5/unet .* did you mean 'sd-1.5:unet'"),
        ("models/sd.safetensors", "no such file: models/sd.safetensors .*; legal: a folder"),
        (
            "https://huggingface.co/org/name",
            "no such folder: https://huggingface.co/org/name .*; legal",
        ),
        ("runs/nothing", "no such folder: runs/nothing .looked at HERE/runs/nothing"),
        ("runs/nothing:unet", "looked at HERE/runs/nothing:unet"),
        ("runs/mine:unet", "did you mean 'runs/mine/unet'"),
        ("runs/2024/mine", "looked at HERE/runs/2024/mine"),
        ("./org/name", "looked at HERE/org/name"),
        ("../name", "looked at HERE/../name"),
        ("name", "looked at HERE/name"),
    ],
)
def test_names_that_people_type_are_not_asked_of_the_hub(spec, told, tmp_path, monkeypatch):
    (tmp_path / "runs" / "mine" / "unet").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    told = told.replace("HERE/../", f"{tmp_path.parent}/").replace("HERE", str(tmp_path))
    for ask in (resolve, resolve_pipeline, resolve_tokenizer):
        with pytest.raises(UserError, match=told) as caught:
            ask(spec)
        tiny.one_line(caught.value)


def test_an_id_that_the_hub_lacks_is_told_to_be_no_folder_here_either(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for ask in (resolve, resolve_pipeline, resolve_tokenizer):
        with pytest.raises(UserError) as caught:
            ask("orgg/name@v1:unet")
        line = tiny.one_line(caught.value)
        assert line.startswith("cannot get 'orgg/name@v1:unet")
        assert line.endswith(f"(no such folder on this machine either: {tmp_path}/orgg/name@v1:unet)")

    # A name of the table means the hub.
    with pytest.raises(UserError, match="from the hub: ") as caught:
        resolve("sd-1.5:unet")
    assert "on this machine" not in str(caught.value)


def test_a_whole_pipelines_folder_is_told_its_parts(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match=f"a whole pipeline; .* such as {tmp_path / 'unet'}"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"_class_name": ["UNet2DConditionModel"]}, "'_class_name' is .* expected str"),
        ({"architectures": "CLIPTextModel"}, "'architectures' is 'CLIPTextModel', expected list"),
        ({"architectures": [["BertModel"]]}, "'architectures' is .* expected names"),
        ({"model_cfg": []}, "'model_cfg' is .* expected dict"),
        ({"model_cfg": {"text_cfg": []}}, "'text_cfg' is .* expected dict"),
    ],
)
def test_a_config_that_names_no_class_is_one_line(tmp_path, values, told):
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=told) as caught:
        load_config(tmp_path)
    assert tiny.one_line(caught.value).startswith(str(tmp_path))


def test_a_vocabulary_that_unpacks_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_files, "MAX_TEXT", 1000)
    (tmp_path / f"{tokenizer_files.CLIP_BPE}.gz").write_bytes(gzip.compress(bytes(10_000_000)))
    with pytest.raises(UserError, match="unpacks to more than the 1000 bytes"):
        tokenizer_files.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [("[1, 2]", "holds list"), ("[" * 200_000, "nested too deep"), ("{", "not readable")],
)
def test_json_of_a_checkpoint_that_is_none(tmp_path, text, told):
    for name, read in (
        ("config.json", safetensors_io.read_config),
        ("tokenizer_config.json", tokenizer_files.load_tokenizer),
    ):
        folder = tmp_path / name.removesuffix(".json")
        folder.mkdir()
        (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n")
        (folder / name).write_text(text)
        with pytest.raises(UserError) as caught:
            read(folder)
        assert f"{name}: {told}" in tiny.one_line(caught.value)
        assert str(caught.value).startswith(str(folder))


def test_a_polygon_of_many_edges_needs_little_memory(monkeypatch):
    """All rows and edges at once took gigabytes; the pixels are the same in bands of any height."""
    angle = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    points = np.stack([50 + 40 * np.cos(3 * angle), 40 + 35 * np.sin(angle)], axis=-1)
    whole, banded = np.zeros((90, 100), bool), np.zeros((90, 100), bool)
    polygons.fill(whole, points)
    monkeypatch.setattr(polygons, "_CELLS", 1000)
    polygons.fill(banded, points)
    np.testing.assert_array_equal(whole, banded)
    assert 500 < whole.sum() < 6000

    start = time.process_time()
    many = np.random.default_rng(0).uniform(0, 100, (20_000, 2))
    monkeypatch.undo()
    polygons.fill(np.zeros((100, 100), bool), many)
    assert time.process_time() - start < 30
