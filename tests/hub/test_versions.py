# SPDX-License-Identifier: Apache-2.0
"""What may stand after the colon of a configuration: each version's parts, from the hub into a step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import one_line

import hub
from digseg_jax.config.parse import parse
from digseg_jax.errors import UserError
from digseg_jax.recipes import VERSIONS, stable_diffusion
from digseg_jax.training.tasks.segmentation import SegmentationTask
from digseg_jax.weights import catalog, load_text_tower
from digseg_jax.weights.hub import converted_folder
from hub import layouts

SIZE = 64
PROMPTS = ("a photo of glandular nuclei", "sky")
TEXT_WIDTHS = {"vitb16": layouts.B16_TEXT_WIDTH, "biomedclip": layouts.BERT_WIDTH}


@pytest.fixture(scope="module")
def server(repositories):
    with hub.serve(repositories) as server:
        yield server


@pytest.fixture
def online(server, tmp_path):
    with hub.environment(server.endpoint, tmp_path):
        yield server


def task_of(version: str) -> SegmentationTask:
    """The task as `monuseg.py:version` builds it, for small images."""
    if version == "biomedclip":
        hub.biomedclip_folder(converted_folder("biomedclip"))
    config = stable_diffusion(version, "monuseg")
    config.data.image_size = SIZE
    return tiny.load_task(tiny.for_devices(parse(config), jax.devices()[:1]), PROMPTS)


def loss_of(task: SegmentationTask):
    """The training loss of two images with a query each, as a function of the parameters."""
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (2, SIZE, SIZE, 3), np.uint8),
        "label": rng.integers(0, 2, (2, SIZE, SIZE), np.int32),
        "query": np.array([[0], [1]], np.int32),
        "query_class": np.array([[1], [0]], np.int32),
        "index": np.arange(2, dtype=np.uint32),
    }
    keys = jax.random.split(jax.random.key(0), 2)
    return lambda params: task.loss(params, task.frozen, batch, keys)[0]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_versions_parts_make_a_loss(online, version):
    task = task_of(version)
    pipeline = layouts.MARIGOLD if version == "marigold" else layouts.SD15
    assert task.parts.tower.width == TEXT_WIDTHS.get(version, layouts.TEXT_WIDTH)
    assert task.unet_config.in_channels == 8
    assert task.unet_config.block_out_channels == tuple(pipeline["unet"]["block_out_channels"])

    # BERT's padding is masked, CLIP's is text
    assert task.frozen["bank"]["tokens"].shape == (2, 77, task.parts.tower.width)
    assert bool(task.frozen["bank"]["mask"].all()) == (version != "biomedclip")

    assert 0.0 < float(jax.jit(loss_of(task))(task.initial())) < 100.0


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_a_versions_gradient_reaches_its_parameters(online, version):
    task = task_of(version)
    gradient = jax.jit(jax.grad(loss_of(task)))(task.initial())
    norms = [float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(gradient)]
    assert np.isfinite(norms).all()
    assert sum(norm > 0.0 for norm in norms) > 0.9 * len(norms)


def test_biomedclip_that_was_not_converted_says_what_to_do(online):
    config = parse(stable_diffusion("biomedclip", "monuseg"))
    with pytest.raises(UserError) as caught:
        load_text_tower(config.model.text)
    message = one_line(caught.value)
    assert "python -m digseg_jax.tools.convert_weights biomedclip;" in message
    assert "open_clip_pytorch_model.bin" not in online.fetched()  # nor anything else of its weights


def test_what_was_converted_needs_no_hub(server, tmp_path):
    with hub.environment(server.endpoint, tmp_path, offline=True):
        folder = converted_folder("biomedclip")
        assert folder.is_relative_to(tmp_path)
        hub.biomedclip_folder(folder)
        for name in ("biomedclip", catalog.hub_id("biomedclip")):
            tower = load_text_tower(name)
            assert (tower.width, tower.max_length, tower.causal) == (layouts.BERT_WIDTH, 256, False)


def test_a_pickle_is_converted_to_where_its_name_finds_it(server, tmp_path, repositories):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    from digseg_jax.tools import convert_weights

    # the published layout, with a real pickle
    published = tmp_path / "repositories" / catalog.hub_id("biomedclip") / "main"
    hub.biomedclip_folder(published)
    weights = published / "open_clip_model.safetensors"
    torch.save(load_file(weights), published / "open_clip_pytorch_model.bin")
    weights.unlink()
    with (
        hub.serve(tmp_path / "repositories") as own,
        hub.environment(own.endpoint, tmp_path / "cache"),
    ):
        convert_weights.main(["biomedclip"])
        assert load_text_tower("biomedclip").width == layouts.BERT_WIDTH
