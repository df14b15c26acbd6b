# SPDX-License-Identifier: Apache-2.0
"""An export as torch's diffusers opens it: one line, and the masks are ours."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import hub
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from digseg_jax.config.parse import parse
from digseg_jax.config.schema import Config
from digseg_jax.diffusion.ddim import timesteps
from digseg_jax.io.image_file import to_rgb
from digseg_jax.models.unet import NOTE
from digseg_jax.prediction.pretrained import PretrainedSegmenter, load_segmenter
from digseg_jax.recipes import stable_diffusion
from digseg_jax.segmentation.sampling import member_noise
from digseg_jax.weights.safetensors_io import PIPELINE_FILE

WORDS = ["water", "snow and ice"]
LIMIT = 1e-4  # of a probability, any pixel's
VIEW = 64
REPOSITORIES = {"sd15": "sd-1.5", "sd21": "sd-2.1"}


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory):
    """A place of their own for the modules that diffusers copies from a folder."""
    pytest.importorskip("torch")
    from diffusers.utils import dynamic_modules_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("hf")))
        yield


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The shipped segmenter, and the folder that it saves."""
    segmenter = load_segmenter()
    return segmenter, segmenter.save_pretrained(tmp_path_factory.mktemp("shipped"))


def miniature(repositories: Path, version: str, codec: str = "binary", **model) -> Config:
    """What configs/ make of a Stable Diffusion, with folders in place of the hub, and float32."""
    values = stable_diffusion(version, "camvid")
    for name, folder in hub.pipeline_folders(repositories, REPOSITORIES[version]).items():
        values.model[name] = folder
    values.model.update(dtype="float32", codec=codec, **model)
    values.compute.attention = "plain"
    values.data.image_size = VIEW
    values.data.templates = ("a photo of a {} in the scene",)
    return parse(values)


def image(height: int, width: int) -> np.ndarray:
    """Blocks of 8 pixels."""
    blocks = np.random.default_rng(0).integers(0, 256, (-(-height // 8), -(-width // 8), 3))
    return np.kron(blocks, np.ones((8, 8, 1), int)).astype(np.uint8)[:height, :width]


def opened(folder: Path):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compare(
    segmenter: PretrainedSegmenter,
    pipe,
    pixels: np.ndarray,
    words: list[str],
    members: int,
    steps: int,
    limit: float = LIMIT,
) -> None:
    """Masks of both sides, from the same seed."""
    ours = segmenter(pixels, words, members, steps, seed=7)
    theirs = pipe(pixels, words, steps=steps, ensemble=members, seed=7)
    assert ours.probability.std() > 0.01, "an even mask compares nothing"
    assert theirs.probability.shape == (len(words), *pixels.shape[:2])
    assert np.abs(ours.probability - theirs.probability).max() <= limit

    # Only where two words are as good as equal may the winner be the other one.
    second, first = np.sort(ours.probability, axis=0)[-2:]
    assert (ours.label == theirs.label)[first - second > 2 * limit].all()
    assert (ours.label == theirs.label).mean() > 0.999


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_the_sampler_visits_our_timesteps(shipped, spacing):
    """Also those of a model that was evaluated with the other spacing."""
    _, folder = shipped
    scheduler = opened(folder).scheduler
    scheduler.register_to_config(timestep_spacing=spacing)
    for steps in (1, 2, 3, 50):
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == timesteps(1000, steps, spacing).tolist()


# Each further step starts from what the last one painted: on such blocks, which no training showed, the
# rounding of two libraries grows a hundredfold.
@pytest.mark.parametrize(
    ("shape", "members", "steps", "limit"),
    [((128, 128), 4, 1, LIMIT), ((128, 128), 4, 2, 1e-3), ((100, 150), 1, 3, 1e-3)],
)
def test_the_shipped_model(shipped, shape, members, steps, limit):
    segmenter, folder = shipped
    compare(segmenter, opened(folder), image(*shape), WORDS, members, steps, limit)


@pytest.mark.parametrize("codec", ["binary", "palette", "prompted"])
@pytest.mark.parametrize("version", ["sd15", "sd21"])
def test_structure_true_stable_diffusion(repositories, tmp_path, version, codec):
    tiny.export(miniature(repositories, version, codec), tmp_path, ("road",))
    segmenter = load_segmenter(tmp_path)
    words = segmenter.description.classes if codec == "palette" else ["road", "tree"]
    compare(segmenter, opened(tmp_path), image(VIEW, VIEW), words, 2, 2)


def test_a_sentence_token_leaves_out_padding_that_is_attended_to(repositories, tmp_path):
    config = miniature(repositories, "sd21", sentence_token=True)
    assert not config.model.mask_padding
    tiny.export(config, tmp_path, ("road",))
    compare(load_segmenter(tmp_path), opened(tmp_path), image(VIEW, VIEW), ["road", "tree"], 1, 2)


@pytest.mark.parametrize(("version", "adapters"), [("sd15", False), ("sd21", True)])
def test_a_parallel_text_pathway(repositories, tmp_path, version, adapters):
    """With text of another width than the U-Net's own."""
    text = str(hub.biomedclip_folder(tmp_path / "text"))
    model = {"text": text, "text_injection": "parallel", "text_adapters": adapters}
    config = miniature(repositories, version, **model)
    folder = tmp_path / "export"
    tiny.export(config, folder, ("road",), tiny.without_zeros)
    segmenter = load_segmenter(folder)
    compare(segmenter, opened(folder), image(VIEW, VIEW), ["road", "tree"], 1, 2)
    assert not np.allclose(*segmenter(image(VIEW, VIEW), ["road", "tree"], 1, 2).probability, atol=1e-3)


def test_noise_from_elsewhere(shipped):
    """The noise of another seed, handed over."""
    segmenter, folder = shipped
    pixels = image(128, 128)
    noise = np.asarray(member_noise(3, jnp.zeros(1, jnp.int32), 1, (32, 32, 4))).transpose(
        0, 1, 4, 2, 3
    )
    theirs = opened(folder)(pixels, "water", steps=1, latents=noise)
    ours = segmenter(pixels, "water", 1, 1, seed=3)
    assert np.abs(ours.probability - theirs.probability).max() <= LIMIT


def test_what_it_does_not_answer_is_one_line(shipped):
    pipe = opened(shipped[1])
    for words, said in (([], "name what"), ([" "], "blank"), (["a"] * 25, "at most 24"),
                        (["word " * 40], "more than 16 tokens")):  # fmt: skip
        with pytest.raises(ValueError, match=said) as caught:
            pipe(image(128, 128), words)
        tiny.one_line(caught.value)


def test_diffusers_own_unet_class_refuses_adapters_in_our_words(shipped):
    import diffusers

    with pytest.raises(ValueError) as caught:
        diffusers.UNet2DConditionModel.from_pretrained(shipped[1] / "unet")
    assert NOTE in str(caught.value)


def test_without_adapters_it_computes_the_same_and_warns(repositories, tmp_path, monkeypatch):
    import diffusers
    from diffusers.configuration_utils import logger

    tiny.export(miniature(repositories, "sd15", text_adapters=False), tmp_path, ("road",))
    said = []
    monkeypatch.setattr(logger, "warning", lambda *arguments: said.append(str(arguments)))
    plain = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert NOTE in " ".join(said)
    own = opened(tmp_path).unet
    assert set(own.state_dict()) == set(plain.state_dict())


def test_trusting_no_code_opens_nothing(shipped):
    from diffusers import DiffusionPipeline

    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(shipped[1])


def test_the_pipeline_is_short_and_its_index_names_what_is_there(shipped):
    folder = shipped[1]
    assert len((folder / "pipeline.py").read_text().splitlines()) < 165
    index = json.loads((folder / PIPELINE_FILE).read_text())
    parts = [name for name, value in index.items() if isinstance(value, list) and name[0] != "_"]
    assert sorted(parts) == sorted(path.name for path in folder.iterdir() if path.is_dir())


@pytest.mark.parametrize("kind", ["transparent", "palette", "16 bits", "float", "gray"])
def test_images_of_any_mode_are_read_as_here(shipped, kind):
    rng = np.random.default_rng(0)
    images = {
        "transparent": Image.fromarray(rng.integers(0, 256, (6, 7, 4), np.uint8), "RGBA"),
        "16 bits": Image.fromarray(rng.integers(300, 40_000, (6, 7)).astype(np.uint16)),
        "float": Image.fromarray(rng.normal(size=(6, 7)).astype(np.float32)),
        "gray": Image.fromarray(rng.integers(0, 256, (6, 7), np.uint8)),
    }
    images["palette"] = images["gray"].convert("P")
    images["palette"].info["transparency"] = 0
    views = runpy.run_path(str(Path(shipped[1]) / "image_processor" / "digseg_views.py"))
    np.testing.assert_allclose(views["_pixels"](images[kind]), to_rgb(images[kind]), atol=1)
