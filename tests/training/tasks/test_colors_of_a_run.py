# SPDX-License-Identifier: Apache-2.0
"""A resumed run keeps the colors of its checkpoint, unless they do not fit it: then it has its own."""

from __future__ import annotations

import logging
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from digseg_jax.errors import UserError
from digseg_jax.io.checkpoint import Checkpointer
from digseg_jax.models.vae import AutoencoderKL
from digseg_jax.training import loop
from digseg_jax.training.loop import Trainer
from digseg_jax.training.tasks import latents
from digseg_jax.training.tasks.segmentation import SegmentationTask
from digseg_jax.weights import save_component

pytestmark = pytest.mark.usefixtures("cover")


@pytest.fixture(scope="module")
def other_vae(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("other") / "vae"
    save_component((tiny.VAE, tiny.random_params(AutoencoderKL, tiny.VAE, 7)), folder)
    return str(folder)


def trainer(folders, folder: Path, accept: bool = False, **changes) -> Trainer:
    options = {"model__codec": "prompted", "data__num_queries": 3} | changes
    config = tiny.config(folders, **options)
    made = tiny.trainer(config, SegmentationTask(config), tiny.mesh(), folder, accept_changes=accept)
    made.examples = {}  # which data there are is another matter
    return made


def save(made: Trainer, constants: dict | None = None) -> dict:
    """Saves a checkpoint as the loop does; returns its constants."""
    constants = constants or made.task.constants()
    with Checkpointer(made.workdir, made.config.checkpoint) as checkpointer:
        _, state = made.start_state(checkpointer)
        config = loop.to_dict(made.config)
        meta = {"config": config, "vocabulary": made.vocabulary, "constants": constants}
        checkpointer.save(1, state, meta)
    return constants


def resumed(made: Trainer) -> int:
    with Checkpointer(made.workdir, made.config.checkpoint) as checkpointer:
        return made.start_state(checkpointer)[0]


def test_colors_of_the_same_form_are_taken_over(folders, tmp_path):
    first = trainer(folders, tmp_path)
    colors = first.task.constants()
    stored = save(first, colors | {"colors": np.asarray(colors["colors"])[::-1].tolist()})
    again = trainer(folders, tmp_path)
    assert resumed(again) == 1 and again.task.constants() == stored


def test_another_number_of_names_has_colors_of_its_own(folders, tmp_path, caplog):
    """With three colors for five names, two names would share one."""
    save(trainer(folders, tmp_path))
    with pytest.raises(UserError) as caught:
        resumed(trainer(folders, tmp_path, data__num_queries=5))
    assert "--accept_changes continues with new ones" in tiny.one_line(caught.value)

    more = trainer(folders, tmp_path, True, data__num_queries=5)
    with caplog.at_level(logging.WARNING, "digseg_jax"):
        assert resumed(more) == 1
    assert "new ones, not those of the weights (another number" in caplog.text
    assert more.task.codec.names == 5 and len(more.task.constants()["colors"]) == 6
    drawn = more.task.codec.draw(jax.random.split(jax.random.key(0), 2), np.arange(10).reshape(2, 5))
    assert all(len(set(colors)) == 5 for colors in np.asarray(drawn.colors).tolist())


def test_another_autoencoder_has_colors_of_its_own(folders, tmp_path, other_vae, caplog):
    first = save(trainer(folders, tmp_path))
    changed = trainer(folders, tmp_path, True, model__vae=other_vae)
    own = changed.task.constants()
    with caplog.at_level(logging.WARNING, "digseg_jax"):
        assert resumed(changed) == 1
    assert f"config.model.vae='{folders['vae']}', now '{other_vae}'" in caplog.text
    assert changed.task.constants() == own != first
    with pytest.raises(UserError, match="trained with other colors"):
        resumed(trainer(folders, tmp_path, model__vae=other_vae))


def test_a_cache_is_compared_with_the_colors_of_the_checkpoint(folders, tmp_path, monkeypatch):
    """Found anew on other hardware, they may differ in a digit: the run's own are in the cache."""
    palette = {"model__codec": "palette", "data__num_queries": 2, "data__latent_cache": "DIR"}
    palette |= {"data__scale_unit": "short_side"}
    compared = []
    monkeypatch.setattr(loop, "check_cache", lambda *_, colors: compared.append(colors))
    own = "check_cached_colors"
    monkeypatch.setattr(loop, own, lambda task, data: compared.append(task.constants()))
    first = trainer(folders, tmp_path, **palette)
    colors = first.task.constants()
    stored = save(first, colors | {"sigma": 0.5})
    assert compared == [False, colors]  # of a new run its own
    compared.clear()
    assert resumed(trainer(folders, tmp_path, **palette)) == 1
    assert compared == [False, stored]


def test_a_rate_for_new_parameters_without_any_is_told(folders, tmp_path, caplog):
    first = trainer(folders, tmp_path / "first", model__codec="binary")
    first.task.export(first.task.initial(), tmp_path, {})
    options = {"optim__new_lr_scale": 10.0, "model__codec": "binary"}
    with caplog.at_level(logging.WARNING, "digseg_jax"):
        trainer(folders, tmp_path / "second", **options)
        assert caplog.text == ""  # the text adapters are new
        unet = str(tmp_path / "unet")
        trainer(folders, tmp_path / "third", model__unet=unet, **options)
    assert f"config.optim.new_lr_scale=10 changes nothing: {unet} lacks no parameter" in caplog.text


def test_a_cache_of_other_colors_is_refused(folders, monkeypatch):
    options = {"model__codec": "palette", "data__scale_unit": "short_side"}
    config = tiny.config(folders, data__latent_cache="DIR", **options)
    task = SegmentationTask(config)
    task.prepare()
    manifest = {"codec_state": task.codec.state()}
    monkeypatch.setattr(latents, "read_manifest", lambda folder: manifest)
    latents.check_cached_colors(task, config.data)
    manifest["codec_state"] = task.codec.state() | {"sigma": 0.5}
    with pytest.raises(UserError, match="another value of what the codec chose"):
        latents.check_cached_colors(task, config.data)
