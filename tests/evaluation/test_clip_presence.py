# SPDX-License-Identifier: Apache-2.0
"""A CLIP decides which classes are asked for: one pass for an image, in place of one for each class."""

from __future__ import annotations

import dataclasses
import json
import shutil

import hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from perfect import Reader

from digseg_jax.aot.dry_run import check_evaluation
from digseg_jax.config.sampling import EStep
from digseg_jax.config.schema import Config
from digseg_jax.errors import UserError
from digseg_jax.evaluation import clip_presence
from digseg_jax.evaluation.clip_presence import ClipPresence, check_presence_model
from digseg_jax.evaluation.evaluator import Evaluator
from digseg_jax.evaluation.examples import EvalExamples
from digseg_jax.evaluation.journal import unpack
from digseg_jax.evaluation.plan import masks_of_a_view
from digseg_jax.prediction.segmenter import Segmenter
from digseg_jax.segmentation.binary import BinaryCodec

NAMES = ("water", "forest", "snow and ice", "barren", "a dog", "traffic light")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A whole CLIPModel as OpenAI publishes it, ViT-B/16 with few channels."""
    return hub.clip_folder(tmp_path_factory.mktemp("clip"), "clip-b16")


@pytest.fixture(scope="module")
def image():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (224, 224, 3), np.uint8)


def test_scores_are_those_of_transformers(clip, image):
    torch = pytest.importorskip("torch")
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    model = CLIPModel.from_pretrained(clip)
    texts = AutoTokenizer.from_pretrained(clip)(
        [f"a photo of a {name}" for name in NAMES], padding=True, return_tensors="pt"
    )
    pixels = CLIPImageProcessor()(image, return_tensors="pt").pixel_values
    with torch.no_grad():
        model.logit_scale.fill_(np.log(100.0))
        expected = model(**texts, pixel_values=pixels).logits_per_image.softmax(-1)[0].numpy()
    np.testing.assert_allclose(ClipPresence(str(clip)).scores(image, NAMES), expected, atol=2e-5)


def test_scores_are_probabilities_and_depend_on_the_image(clip, image):
    presence = ClipPresence(str(clip))
    scores = presence.scores(image, NAMES)
    assert scores.shape == (6,) and scores.min() >= 0 and scores.sum() == pytest.approx(1)
    other = presence.scores(np.ascontiguousarray(image[:90, ::-1] // 3), NAMES)
    assert np.abs(scores - other).max() > 1e-3
    # A name's rank does not depend on the other names.
    fewer = presence.scores(image, NAMES[::2])
    np.testing.assert_allclose(fewer, scores[::2] / scores[::2].sum(), rtol=1e-4)


def test_the_gate_asks_for_the_best_classes_of_the_clip_whatever_the_network_finds(clip, image):
    asked = []

    def read(image, query):
        asked.append(query)
        return np.full(image.shape[:2], 0.6, np.float32)

    source = [{"image": image, "label": np.zeros(image.shape[:2], np.int32), "name": "0"}]
    own = tuple((c,) for c in range(len(NAMES)))
    examples = EvalExamples(source, "val", (0,), NAMES, own)
    settings = dataclasses.replace(Config().eval, gate_limit=2, presence_model=str(clip))
    reader = Reader(read, np.zeros((len(NAMES), 4, 4), np.float32))
    row = Evaluator(reader, examples, settings, seed=0).scores(EStep(1, 1), protocol="gated").rows[0]

    expected = ClipPresence(str(clip)).scores(image, NAMES)
    np.testing.assert_allclose(row["presence"], expected)
    best = sorted(np.argsort(-expected)[:2])
    assert asked == [NAMES[c] for c in best]

    # The reader says one second an image; the gate's pass is part of the time, its compilation is not.
    gate = clip_presence.load_presence(str(clip))
    assert row["seconds"] == pytest.approx(1 + gate.seconds) and gate.seconds > 0
    before = gate.seconds
    gate.scores(image, NAMES)
    assert before < 20 * (gate.seconds - before)


def test_a_network_is_asked_for_the_same_classes_on_every_number_of_devices(clip, folders, image):
    changes = {"eval__presence_model": str(clip), "eval__gate_limit": 3, "eval__view_size": (32,)}
    task = tiny.load_task(tiny.config(folders, **changes), prompts=NAMES)
    label = np.random.default_rng(1).integers(0, len(NAMES), (40, 56)).astype(np.int32)
    source = [
        {"image": image[k : k + 40, k : k + 56], "label": label, "name": str(k)} for k in range(3)
    ]
    examples = EvalExamples(source, "val", (0, 1, 2), NAMES, tuple((c,) for c in range(len(NAMES))))

    rows = {}
    for devices in (1, 2):
        segmenter = Segmenter(task, task.initial(), mesh=tiny.mesh(data=devices))
        gated = Evaluator(segmenter, examples, task.config.eval, seed=0)
        rows[devices] = gated.scores(EStep(1, 1), protocol="gated").rows
    for one, two in zip(rows[1], rows[2], strict=True):
        assert one["presence"] == two["presence"] and one["queries"] == 3
        np.testing.assert_array_equal(unpack(one["confusion"]), unpack(two["confusion"]))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_its_program_is_lowered_for_accelerators(clip, platform):
    presence = ClipPresence(str(clip))
    image = jax.ShapeDtypeStruct((1, presence.size, presence.size, 3), jnp.float32)
    traced = clip_presence._embed.trace(presence.graphdef, presence.params, image)
    assert "stablehlo" in traced.lower(lowering_platforms=(platform,)).as_text()


def test_no_coarse_pass_is_planned():
    settings = dataclasses.replace(Config().eval, ensemble=8, steps=2, gate_limit=16)
    clipped = dataclasses.replace(settings, presence_model="clip-l14")
    codec = BinaryCodec()
    assert masks_of_a_view(settings, codec, 847) - masks_of_a_view(clipped, codec, 847) == 847


def test_what_is_no_clip_is_told_before_any_work(clip, folders, tmp_path):
    with pytest.raises(UserError, match=r"config\.eval\.presence_model=.*nowhere"):
        check_presence_model(str(tmp_path / "nowhere"))

    # Stable Diffusion's text encoder is half of a CLIP.
    text = shutil.copytree(clip, tmp_path / "text")
    config = json.loads((text / "config.json").read_text())
    config |= {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
    (text / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.eval\.presence_model=.*CLIPTextModel"):
        check_presence_model(str(text))

    task = tiny.load_task(tiny.config(folders, eval__presence_model=str(text)), prompts=NAMES)
    with pytest.raises(UserError, match="presence_model"):
        check_evaluation(task, tiny.mesh())
    check_presence_model(str(clip))
