# SPDX-License-Identifier: Apache-2.0
"""The U-Net's own text encoder: found beside it wherever it lies, and cut where its pipeline's is."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
import tiny

from digseg_jax.config.schema import ModelConfig
from digseg_jax.models.text.clip_text import ClipTextConfig, CLIPTextModel
from digseg_jax.models.unet import UNet2DConditionModel
from digseg_jax.training.tasks import unet_start
from digseg_jax.training.tasks.segmentation import SegmentationTask
from digseg_jax.training.tasks.unet_start import encode_empty, native_text, skipped_layers
from digseg_jax.weights import load_text_tower, save_component

WORDS = ["<|startoftext|>", "<|endoftext|>", "a", "a</w>"]
WHOLE = ClipTextConfig(
    vocab_size=len(WORDS),
    hidden_size=tiny.UNET.cross_attention_dim,
    intermediate_size=8,
    num_hidden_layers=3,
    num_attention_heads=2,
    max_position_embeddings=5,
    eos_token_id=1,
)


@pytest.mark.parametrize(
    ("unet", "expected"),
    [
        ("org/name:unet", "org/name:text_encoder"),
        ("org/name:v2/unet", "org/name:v2/text_encoder"),
        ("org/name@branch:a/b/unet", "org/name@branch:a/b/text_encoder"),
        ("sd-2.1:unet", "sd-2.1:text_encoder"),
        ("org/name:my_unet", "minilm"),
        ("assets:prior", "minilm"),
    ],
)
def test_a_repositorys_encoder_lies_beside_the_unet(unet, expected):
    assert native_text(ModelConfig(unet=unet)) == expected


def test_so_does_that_of_a_bucket(monkeypatch, tmp_path):
    """A local folder stands in for the bucket."""
    monkeypatch.setattr(unet_start, "as_path", lambda spec: tmp_path / spec.removeprefix("gs://"))
    model = ModelConfig(unet="gs://b/sd15/unet")
    (tmp_path / "b" / "sd15" / "unet").mkdir(parents=True)
    assert native_text(model) == "minilm"
    (tmp_path / "b" / "sd15" / "text_encoder").mkdir()
    assert native_text(model) == str(tmp_path / "b" / "sd15" / "text_encoder")
    (tmp_path / "b" / "sd15.safetensors").touch()
    single = ModelConfig(unet="gs://b/sd15.safetensors")
    assert native_text(single) == str(tmp_path / "b" / "sd15.safetensors")


def encoder(folder: Path, config: ClipTextConfig) -> str:
    """Writes a text encoder with its tokenizer."""
    save_component((config, tiny.random_params(CLIPTextModel, WHOLE, 4)), folder)
    (folder / "vocab.json").write_text(str({w: i for i, w in enumerate(WORDS)}).replace("'", '"'))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return str(folder)


@pytest.fixture
def pipeline(tmp_path) -> dict[str, str]:
    """A U-Net whose pipeline has two layers of the encoder, the whole one of three, and a whole one."""
    save_component(
        (tiny.UNET, tiny.random_params(UNet2DConditionModel, tiny.UNET, 2)), tmp_path / "unet"
    )
    cut = dataclasses.replace(WHOLE, num_hidden_layers=2)
    params = tiny.random_params(CLIPTextModel, WHOLE, 4)
    del params["encoder"]["layers"]["2"]
    encoder(tmp_path / "text_encoder", WHOLE)
    save_component((cut, params), tmp_path / "text_encoder")
    return {"unet": str(tmp_path / "unet"), "text": encoder(tmp_path / "whole", WHOLE)}


def parallel(folders, pipeline, **changes):
    options = {"model__unet": pipeline["unet"], "model__text_injection": "parallel"}
    return tiny.config(folders, **options | {"model__unet_text": pipeline["text"]} | changes)


def test_a_whole_encoder_is_cut_as_the_pipelines_is(folders, pipeline, caplog):
    config = parallel(folders, pipeline)
    with caplog.at_level(logging.INFO, "digseg_jax"):
        params = SegmentationTask(config).initial()
    assert f"{pipeline['text']} without its last layer" in caplog.text
    found = params["mid_block"]["attentions"]["0"]["transformer_blocks"]["0"]["attn2"]["prompt"]
    own = encode_empty(
        load_text_tower(str(Path(pipeline["unet"]).parent / "text_encoder")), config.model
    )
    whole = encode_empty(load_text_tower(pipeline["text"]), config.model)
    np.testing.assert_array_equal(found["embedding"], own)
    assert np.abs(own - whole).max() > 1e-3


def test_the_queries_encoder_is_cut_for_the_prompt_alone(folders, pipeline):
    """Of the queries config.model.text_skip_layers says it."""
    text = pipeline["text"]
    assert skipped_layers(parallel(folders, pipeline, model__text=text).model) == 1
    assert skipped_layers(parallel(folders, pipeline, model__unet_text="").model) == 0
    alone = parallel(folders, pipeline | {"unet": folders["unet"]}, model__text=text)
    assert skipped_layers(alone.model) == 0
    cut = dataclasses.replace(alone.model, text_skip_layers=2, unet_text="")
    assert skipped_layers(cut) == 2


def test_a_whole_one_of_an_unknown_pipeline_is_worth_a_warning(folders, pipeline, caplog, monkeypatch):
    monkeypatch.setattr(unet_start, "_WHOLE_H14", unet_start._Tower(3, WHOLE.hidden_size))
    alone = parallel(folders, pipeline | {"unet": folders["unet"]})
    with caplog.at_level(logging.WARNING, "digseg_jax"):
        assert skipped_layers(alone.model) == 0
    assert "was trained with the output of the 23rd" in caplog.text


@pytest.mark.parametrize(
    ("unet", "size"),
    [("sd-2.1:unet", (23, 1024)), ("marigold:unet", (23, 1024)), ("sd-1.5:unet", None)],
)
def test_known_pipelines_are_judged_by_the_table_not_by_a_download(unet, size):
    assert unet_start._pipeline_tower(ModelConfig(unet=unet, unet_text="openclip-h14")) == size


def test_inputs_for_both_latents_are_taken_as_image_and_mask_and_that_is_told(
    folders, tmp_path, caplog
):
    wide = dataclasses.replace(tiny.UNET, in_channels=8)
    save_component((wide, tiny.random_params(UNet2DConditionModel, wide, 2)), tmp_path)
    with caplog.at_level(logging.INFO, "digseg_jax"):
        SegmentationTask(tiny.config(folders)).initial()
        assert "input channels" not in caplog.text
        SegmentationTask(tiny.config(folders, model__unet=str(tmp_path))).initial()
    told = "of the 8 input channels of {} the first half are taken as the image's latent"
    assert told.format(tmp_path) in caplog.text
