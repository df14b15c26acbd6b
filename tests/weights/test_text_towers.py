# SPDX-License-Identifier: Apache-2.0
"""Where CLIP and BiomedCLIP towers and their tokenizers come from: folders, files, known names."""

from __future__ import annotations

import dataclasses
import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from digseg_jax import weights
from digseg_jax.config.schema import ModelConfig
from digseg_jax.errors import UserError
from digseg_jax.models import functional
from digseg_jax.models.text import tokenizer as tokenizer_lib
from digseg_jax.models.text.bert import BertConfig
from digseg_jax.models.text.clip_text import ClipTextConfig, CLIPTextModel
from digseg_jax.models.text.open_clip import HFTextEncoder, OpenClipTextConfig
from digseg_jax.packages import locate
from digseg_jax.segmentation.prompt_bank import encode_prompts
from digseg_jax.tools import convert_weights
from digseg_jax.training.tasks.parts import encode_bank
from digseg_jax.weights import catalog, hub, load_text_tower
from digseg_jax.weights.tokenizer_files import load_tokenizer

LETTERS = ["c", "a", "t", "!", "c</w>", "a</w>", "t</w>", "!</w>"]
MERGES = ["a t</w>", "c at</w>"]
VOCAB = ["!", *LETTERS[:3], *LETTERS[4:], "at</w>", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
IDS = {word: i for i, word in enumerate(VOCAB)}
START, END = IDS["<|startoftext|>"], IDS["<|endoftext|>"]
CONFIG = ClipTextConfig(
    vocab_size=len(VOCAB),
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=6,
    eos_token_id=END,
)


def write_tokenizer(folder: Path, pad_token: str | dict | None = None) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(IDS))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")
    if pad_token is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": pad_token}))
        # transformers wrote the class default here, whatever the tokenizer padded with
        settings = {"pad_token": "<|endoftext|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture
def pipeline(tmp_path) -> Path:
    """Text encoder and tokenizer in two folders, as in a Stable Diffusion repository."""
    weights.save_component(CLIPTextModel(CONFIG, rngs=nnx.Rngs(1)), tmp_path / "text_encoder")
    write_tokenizer(tmp_path / "tokenizer", "!")
    return tmp_path


@pytest.mark.parametrize(
    ("pad_token", "pad_id"),
    [
        (None, END),
        ("<|endoftext|>", END),  # Stable Diffusion 1.x: 49407
        ("!", 0),  # Stable Diffusion 2.x
        ({"content": "!", "lstrip": False}, 0),
    ],
)
def test_clip_vocabulary_and_padding(tmp_path, pad_token, pad_id):
    write_tokenizer(tmp_path, pad_token)
    ids, mask = load_tokenizer(tmp_path)(["Cat  at", "cat"], 6)
    cat, at = IDS["cat</w>"], IDS["at</w>"]
    np.testing.assert_array_equal(
        ids, [[START, cat, at, END, pad_id, pad_id], [START, cat, END, *[pad_id] * 3]]
    )
    np.testing.assert_array_equal(mask.sum(1), [4, 3])


def test_a_padding_token_outside_the_vocabulary_is_refused(tmp_path):
    write_tokenizer(tmp_path, "[PAD]")
    with pytest.raises(UserError, match=r"padding token '\[PAD\]' is not in the vocabulary"):
        load_tokenizer(tmp_path)


def test_another_models_vocabulary_is_refused(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0}))
    with pytest.raises(UserError, match=r"not a CLIP vocabulary: no <\|startoftext\|>"):
        load_tokenizer(tmp_path / "vocab.json")


def test_clips_bpe_file_is_a_vocabulary_too(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_lib, "CLIP_MERGES", 2)
    file = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    with gzip.open(file, "wt", encoding="utf-8") as out:
        out.write("\n".join(["#version", *MERGES, "never read"]) + "\n")
    ids, _ = load_tokenizer(file)(["cat !"], 6)
    # 256 letters, the same at the end of a word, two merges, start, end; "!" is the first letter
    assert ids.tolist() == [[514, 513, 256, 515, 515, 515]]
    monkeypatch.setattr(tokenizer_lib, "CLIP_MERGES", 9)
    with pytest.raises(UserError, match="3 merges, expected 9"):
        load_tokenizer(tmp_path)


def test_the_real_bpe_file_gives_clips_ids():
    try:
        file = locate("open_clip_torch", "bpe_simple_vocab_16e6.txt.gz")
    except UserError as error:
        pytest.skip(str(error))
    ids, _ = load_tokenizer(file)(["a photo of a cat"], 9)
    assert ids.tolist() == [[49406, 320, 1125, 539, 320, 2368, 49407, 49407, 49407]]


def test_tower_of_a_pipeline_finds_its_tokenizer(pipeline):
    tower = load_text_tower(str(pipeline / "text_encoder"))
    assert (tower.width, tower.max_length, tower.tokenizer.pad_id) == (8, 6, 0)
    bank = encode_prompts(tower.graphdef, tower.params, tower.tokenizer, ("cat",), max_length=6)
    assert bank.tokens.shape == (1, 6, 8) and bank.mask.sum() == 3


def test_unmasked_padding_is_text_as_stable_diffusion_has_it(pipeline, folders):
    tower = load_text_tower(str(pipeline / "text_encoder"))
    model = ModelConfig(max_tokens=6, sentence_token=False, mask_padding=False)
    bank = encode_bank(tower, ("cat",), model)
    masked = encode_bank(tower, ("cat",), dataclasses.replace(model, mask_padding=True))
    ids, _ = tower.tokenizer(("cat",), 6)
    plain = functional.merge(tower.graphdef, tower.params)(ids).last_hidden_state
    np.testing.assert_allclose(bank.tokens, plain, atol=1e-6)
    assert bank.mask.all() and masked.mask.sum() == 3
    np.testing.assert_allclose(bank.tokens[:, :3], masked.tokens[:, :3], atol=1e-6)  # causal
    bert = encode_bank(load_text_tower(folders["text"]), ("snow and ice",), model)
    assert 3 <= bert.mask.sum() < 6  # no CLIP: masked whatever the setting


def test_skipping_layers_is_for_clip_towers(pipeline, folders):
    folder = str(pipeline / "text_encoder")
    short = load_text_tower(folder, skip_layers=1)
    assert list(short.params["encoder"]["layers"]) == ["0"]
    with pytest.raises(UserError, match="holds a BertModel; only CLIP text towers can skip layers"):
        load_text_tower(folders["text"], skip_layers=1)


def test_a_whole_clip_model_must_be_told_which_tower(tmp_path):
    values = {"architectures": ["CLIPModel"], "model_type": "clip", "text_config": CONFIG.to_dict()}
    weights.save_component(CLIPTextModel(CONFIG, rngs=nnx.Rngs(1)), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="holds a CLIPModel; say which part with expect=CLIPTextM"):
        weights.load_component(tmp_path)
    assert isinstance(weights.load_component(tmp_path, expect="CLIPTextModel"), CLIPTextModel)
    with pytest.raises(UserError, match="holds a CLIPModel; expected BertModel"):
        weights.load_component(tmp_path, expect="BertModel")
    with pytest.raises(UserError, match=r"missing: vision_model\.embeddings"):
        weights.load_component(tmp_path, expect="CLIPVisionModelWithProjection")


OPEN_CLIP = OpenClipTextConfig(
    BertConfig(
        vocab_size=12,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=9,
        add_pooling_layer=False,
    ),
    embed_dim=4,
    projection="mlp",
    pooler="cls_last_hidden_state_pooler",
    context_length=256,
    hf_model_name="org/bert",
)


@pytest.mark.parametrize("projection", ["mlp", "linear"])
@pytest.mark.parametrize("pooler", ["cls_last_hidden_state_pooler", "cls_pooler", "mean_pooler"])
def test_open_clip_layouts_load_as_saved(tmp_path, projection, pooler):
    bert = dataclasses.replace(OPEN_CLIP.bert, add_pooling_layer=pooler == "cls_pooler")
    config = dataclasses.replace(OPEN_CLIP, bert=bert, projection=projection, pooler=pooler)
    model = HFTextEncoder(config, rngs=nnx.Rngs(2))
    file = weights.save_component(model, tmp_path)
    assert file.name == "open_clip_model.safetensors"
    again = weights.load_component(tmp_path)
    assert again.config == config and config.max_position_embeddings == 9
    ids = np.array([[1, 2, 0], [3, 4, 5]])
    expected, got = (m(ids, ids != 0) for m in (model, again))
    np.testing.assert_array_equal(got.pooled, expected.pooled)
    assert got.pooled.shape == (2, 4)


def test_open_clip_text_towers_of_other_kinds_are_refused(tmp_path):
    weights.save_component(HFTextEncoder(OPEN_CLIP, rngs=nnx.Rngs(2)), tmp_path)
    file = tmp_path / "open_clip_config.json"
    values = json.loads(file.read_text())
    text = values["model_cfg"]["text_cfg"]
    file.write_text(json.dumps({"model_cfg": {"text_cfg": text | {"hf_proj_type": "deep"}}}))
    with pytest.raises(UserError, match="hf_proj_type='deep' is not supported; legal: mlp, linear"):
        weights.load_component(tmp_path)
    file.write_text(json.dumps({"model_cfg": {"text_cfg": {"width": 512}}}))
    with pytest.raises(UserError, match="names open_clip's own text tower"):
        weights.load_component(tmp_path)


def test_known_names_are_unique_and_stand_for_hub_ids():
    names = [k.name for k in catalog.KNOWN]
    assert len(set(names)) == len(names)
    for spec in catalog.names():
        assert hub._HUB_ID.fullmatch(catalog.expand(spec)), spec
    assert catalog.expand("sd-1.5:unet") == "stable-diffusion-v1-5/stable-diffusion-v1-5:unet"
    assert catalog.expand("org/name:unet") == "org/name:unet"
    assert any("convert_weights biomedclip" in row for row in catalog.rows())


def test_a_misspelt_known_name_or_part_is_told_what_is_legal():
    with pytest.raises(UserError, match="did you mean 'sd-1.5:unet'"):
        hub.resolve("sd1.5:unet")
    for spec in ("sd-1.5:unett", "sd-1.5"):
        with pytest.raises(UserError, match=f"{spec}: no such part; legal: sd-1.5:unet, sd-1.5:vae"):
            hub.resolve(spec)


def test_the_table_of_the_documents_lists_every_known_repository():
    table = (Path(catalog.__file__).parent / "README.md").read_text()
    assert [k.name for k in catalog.KNOWN if f"`{k.hub_id}`" not in table] == []


def test_a_pipelines_tokenizer_is_asked_for_with_its_text_encoder():
    patterns = hub._patterns("text_encoder/", "")
    assert {"tokenizer/merges.txt", "text_encoder/model.safetensors"} <= set(patterns)
    assert not any("tokenizer/" in p for p in hub._patterns("unet/", ""))


def test_converting_without_torch_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert convert_weights.main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert "needs torch, which this project does not install" in capsys.readouterr().err


@pytest.fixture
def pickled(tmp_path) -> tuple[Path, dict]:
    """A BiomedCLIP-like folder as published: one pickle, a config, a vocabulary."""
    torch = pytest.importorskip("torch")
    folder = tmp_path / "published"
    folder.mkdir()
    weights.save_component(HFTextEncoder(OPEN_CLIP, rngs=nnx.Rngs(2)), tmp_path / "ours")
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "ours" / "open_clip_model.safetensors")
    torch.save(tensors, folder / "open_clip_pytorch_model.bin")
    config = (tmp_path / "ours" / "open_clip_config.json").read_text()
    (folder / "open_clip_config.json").write_text(config)
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nice\n")
    return folder, tensors


def test_a_pickle_is_converted_to_a_folder_that_loads(pickled, tmp_path, capsys):
    folder, tensors = pickled
    with pytest.raises(UserError, match=r"holds only open_clip_pytorch_model\.bin"):
        weights.load_component(folder)
    convert_weights.main([str(folder), str(tmp_path / "out")])
    assert "open_clip_model.safetensors" in capsys.readouterr().out
    tower = load_text_tower(str(tmp_path / "out"))
    assert (tower.width, tower.tokenizer.pad_id) == (64, 0)
    kernel = tensors["text.proj.2.weight"].numpy().T
    np.testing.assert_array_equal(tower.params["proj"]["2"]["kernel"], kernel)


def test_a_pickle_of_more_than_tensors_is_refused(pickled, tmp_path):
    import torch

    folder, tensors = pickled
    torch.save({**tensors, "epoch": 3}, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(UserError, match="holds more than tensors: epoch"):
        convert_weights.convert(folder, tmp_path / "out")
    torch.save({**tensors, "code": Path("x")}, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(UserError, match="is not a checkpoint of tensors only"):
        convert_weights.convert(folder, tmp_path / "out")
    (folder / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"no diffusion_pytorch_model\.bin"):
        convert_weights.convert(folder, tmp_path / "out")
