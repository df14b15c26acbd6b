# SPDX-License-Identifier: Apache-2.0
"""Export of a segmenter as a pipeline folder that torch's diffusers opens too; made without torch.

model_index.json, pipeline.py       list of the components, and torch code that runs them
unet/ vae/ text_encoder/            trained weights, and copies of the frozen parts
tokenizer/ scheduler/               in the formats of transformers and diffusers
image_processor/                    settings for cutting an image of any size into views
segmenter.json, calibration.json,   settings, calibration and codec state (palette.json, prompted.json)
README.md                           for this program; the model card for people
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np

from digseg_jax.assets import LICENSE
from digseg_jax.config.sampling import NUM_TRAIN_TIMESTEPS
from digseg_jax.config.schema import DataConfig, DiffusionConfig, EvalConfig, ModelConfig
from digseg_jax.config.templates import asked_templates
from digseg_jax.diffusion.schedule import BETA_END, BETA_START
from digseg_jax.io import storage
from digseg_jax.io.json_file import read_json
from digseg_jax.io.storage import AnyPath
from digseg_jax.io.workdir import CALIBRATION
from digseg_jax.log import log
from digseg_jax.models.unet import OWN_CLASS
from digseg_jax.prediction.description import FILE as DESCRIPTION
from digseg_jax.prediction.description import (
    OWN,
    PARTS,
    UNET,
    Description,
    part_folder,
    read_description,
    unet_folder,
    write_description,
)
from digseg_jax.prediction.model_card import model_card
from digseg_jax.prediction.segmenter import trained_short_side, view_size
from digseg_jax.segmentation.calibration import UNFITTED, stored_scale
from digseg_jax.segmentation.codecs import make_codec, state_file
from digseg_jax.training.tasks.parts import AUTOENCODERS
from digseg_jax.weights import load_config
from digseg_jax.weights.load import copy_component, copy_files
from digseg_jax.weights.safetensors_io import DIFFUSERS_STEM, PIPELINE_FILE, component_files
from digseg_jax.weights.text_tower import TEXT_CLASSES, load_tower_tokenizer
from digseg_jax.weights.upload import check_target, push_folder

CARD = "README.md"
OLD_WEIGHTS = ("config.json", f"{DIFFUSERS_STEM}.safetensors")  # weight files of exports without unet/
SCALE = 2.0  # scale of the evidence if no evaluation has fitted one
_CODE = Path(__file__).parent / "torch_pipeline"

# module with torch code -> folder of the export in which diffusers looks for it
_FILES = {
    "pipeline": "",
    "digseg_unet": UNET,
    "digseg_scheduler": "scheduler",
    "digseg_views": "image_processor",
}


def complete_export(folder: Path, description: Description) -> None:
    """Completes an export that holds only the trained U-Net and the codec's state.

    Raises:
      UserError: a frozen part is missing.
    """
    config = description.recorded_config()
    classes = {}

    # Copy the frozen parts. Their classes go into the list of components.
    legal = dict(zip(PARTS, (AUTOENCODERS, TEXT_CLASSES), strict=True))
    sources = {
        key: part_folder(part.pinned)
        for key, part in zip(PARTS, (description.vae, description.text), strict=True)
    }
    for key, source in sources.items():
        classes[key] = copy_component(source, folder / OWN[key], expect=legal[key])
    _write_tokenizer(sources["model.text"], folder / "tokenizer", config.model.max_tokens)
    write_description(folder, description)

    # Write the files for torch, model_index.json last: a folder that has it is complete.
    data, model, evaluation = config.data, config.model, config.eval
    scheduler = _scheduler(config.diffusion, evaluation.spacing)
    storage.write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    views = _views(data, evaluation)
    storage.write_json(folder / "image_processor" / "preprocessor_config.json", views)
    for name, place in _FILES.items():
        copy_files({f"{name}.py": _CODE / f"{name}.py"}, folder / place)
    storage.write_bytes(folder / CARD, model_card(description).encode())
    settings = _settings(data, model, evaluation, description, classes["model.text"], folder)
    storage.write_json(folder / PIPELINE_FILE, _index(classes, settings))


def copy_export(source: Path, target: Path) -> None:
    """Copies an export to another folder; one of an older layout is completed to a whole pipeline.

    Raises:
      UserError: a frozen part of the older export is missing.
    """
    # A whole pipeline is copied file by file.
    if (source / PIPELINE_FILE).is_file():
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            copy_files({file.name: file}, target / file.relative_to(source).parent)
        return

    # Older layout: copy the weights, and write config.json anew, so that diffusers' own class notices
    # the keys that it lacks.
    description = read_description(source)
    copy_files(component_files(unet_folder(source)), target / UNET)
    storage.write_json(target / UNET / "config.json", load_config(unet_folder(source)).to_dict())

    # Calibration and codec state may be absent; the rest is made from the description.
    beside = (CALIBRATION, LICENSE, state_file(description.recorded_config().model.codec, source).name)
    kept = {name: source / name for name in beside if (source / name).is_file()}
    copy_files(kept, target)
    complete_export(target, description)


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What evaluations have added to an export, and the checkpoint that it is of."""

    checkpoint: str
    calibration: dict[str, Any]
    card: bytes


def fitted_there(folder: AnyPath) -> Fitted | None:
    """What evaluations have added to the export in a folder; None if nothing was fitted."""
    if not (folder / CALIBRATION).is_file() or not (folder / CARD).is_file():
        return None
    checkpoint = read_description(folder).checkpoint
    return Fitted(checkpoint, read_json(folder / CALIBRATION), (folder / CARD).read_bytes())


def put_back(folder: AnyPath, fitted: Fitted | None) -> None:
    """Adds to an export what an earlier one of the same checkpoint had, unless it has its own."""
    description = read_description(folder)
    if not fitted or fitted.checkpoint != description.checkpoint or (folder / CALIBRATION).exists():
        return
    storage.write_json(folder / CALIBRATION, fitted.calibration)
    storage.write_bytes(folder / CARD, fitted.card)
    _write_scale(folder, fitted.calibration["scale"])


def _write_scale(folder: AnyPath, scale: float) -> None:
    """Writes the fitted scale for torch, too; a palette has a scale of its own and keeps it."""
    index = read_json(folder / PIPELINE_FILE)
    if not index["settings"]["prototypes"]:
        index["settings"]["scale"] = scale
        storage.write_json(folder / PIPELINE_FILE, index)


def add_results(folder: AnyPath, results: dict[str, Any]) -> None:
    """Adds an evaluation's results to an export: the calibration, and the scores in the model card.

    Only of the whole split, or of as many images as the training's own configuration evaluates: a trial
    on a few images, or without a calibration, leaves the calibration as it is.
    """
    description = read_description(folder)
    own = description.recorded_config().eval
    if not _enough(results, "num_images", "split_images", own.num_images):
        log.info("a trial: the export keeps its calibration and the scores of its card")
        return

    # What was not fitted is the default scale without any biases.
    wanted = own.calibrate_images or own.num_images
    fitted = results["calibration"]["split"] != UNFITTED
    fitted &= _enough(results, "calibration_images", "calibration_split_images", wanted)
    if fitted:
        storage.write_json(folder / CALIBRATION, results["calibration"])

    # Exports of older versions have neither a card nor a list of components.
    if not (folder / PIPELINE_FILE).is_file():
        return

    storage.write_bytes(folder / CARD, model_card(description, results).encode())
    if fitted:
        _write_scale(folder, results["calibration"]["scale"])


def _enough(results: dict[str, Any], used: str, there: str, wanted: int) -> bool:
    """Whether results are of all images, or of the wanted number (0: all).

    used, there: their keys for the images that were used, and for those of the split. Results of
    earlier versions lack them, and are taken as they are.
    """
    if used not in results or there not in results:
        return True
    whole: int = results[there]
    return bool(results[used] >= min(wanted or whole, whole))


def keep_results(folder: AnyPath, path: AnyPath) -> None:
    """Adds the results.json at `path` to an export if it evaluated the same checkpoint."""
    if path.is_file():
        results, own = read_json(path), read_description(folder).provenance()
        weights = results.get("weights")
        if (
            weights and own | weights == own
        ):  # results of before there were all of these facts lack some
            add_results(folder, results)


def push_export(folder: Path, target: str, *, private: bool | None = None) -> str:
    """Uploads an export to the hub as one commit; returns `org/name@commit`.

    Raises:
      UserError: another model is there, the hub rejects the upload, or the connection was lost.
    """
    description = read_description(folder)
    message = f"Segmenter of digseg_jax after {description.steps} steps"

    # An earlier export there is replaced, with the files of these kinds that this one lacks.
    ours = ("*.json", "*.py", "*.safetensors", "*.txt")
    commit = push_folder(folder, target, message, private=private, marker=DESCRIPTION, replaced=ours)
    return f"{check_target(target)[0]}@{commit}"


def _write_tokenizer(source: Path, folder: Path, max_tokens: int) -> None:
    """Writes tokenizer.json and its settings, the format that this program and torch read alike."""
    tokenizer = load_tower_tokenizer(source)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": tokenizer.pad_token,
        "model_max_length": max_tokens,
    }
    storage.write_bytes(folder / "tokenizer.json", tokenizer.to_json().encode())
    storage.write_json(folder / "tokenizer_config.json", settings)


def _scheduler(diffusion: DiffusionConfig, spacing: str) -> dict[str, Any]:
    """Content of scheduler_config.json: the training's noise schedule and the evaluation's spacing."""
    return {
        "_class_name": "DigsegScheduler",
        "_diffusers_version": importlib.metadata.version("diffusers"),
        "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
        "beta_start": BETA_START,
        "beta_end": BETA_END,
        "beta_schedule": "scaled_linear",
        "prediction_type": diffusion.prediction_type,
        "rescale_betas_zero_snr": diffusion.zero_snr,
        "timestep_spacing": spacing,
        "set_alpha_to_one": True,
        "steps_offset": 1,  # applies to leading timesteps only, see diffusion.ddim
        "clip_sample": False,
    }


def _views(data: DataConfig, evaluation: EvalConfig) -> dict[str, Any]:
    """Content of preprocessor_config.json: size of a view in pixels, and the way of cutting views."""
    inference = evaluation.inference
    return {
        "_class_name": "DigsegViews",
        "size": list(view_size(evaluation, data)),
        "inference": "window" if inference == "auto" else inference,
        "short_side": evaluation.short_side or trained_short_side(data),
    }


def _index(classes: dict[str, str], settings: dict[str, Any]) -> dict[str, Any]:
    """Content of model_index.json: component -> [library or module, class], and the settings."""
    return {
        "_class_name": ["pipeline", "DigsegPipeline"],
        "_diffusers_version": importlib.metadata.version("diffusers"),
        "unet": ["digseg_unet", OWN_CLASS],
        "vae": ["diffusers", classes["model.vae"]],
        "text_encoder": ["transformers", classes["model.text"]],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "scheduler": ["digseg_scheduler", "DigsegScheduler"],
        "image_processor": ["digseg_views", "DigsegViews"],
        "settings": settings,
    }


def _settings(
    data: DataConfig,
    model: ModelConfig,
    evaluation: EvalConfig,
    description: Description,
    tower: str,
    folder: Path,
) -> dict[str, Any]:
    """Settings of pipeline.py beyond its components: text, decoding, scale, templates and limits."""
    # A palette's state: its colors, and the scale that belongs to them.
    codec = make_codec(model.codec, data, len(description.classes))
    path = state_file(codec.name, folder)
    state = read_json(path) if path.is_file() else {}

    # Scale of the evidence: the codec's own, a fitted one, or the default.
    scale, calibration = SCALE, folder / CALIBRATION
    if state:
        codec.restore(state)
        scale = codec.scale or SCALE
    elif calibration.is_file():
        scale = stored_scale(calibration)

    # Above `decode_limit` queries this program reads masks with its linear probe. The torch pipeline
    # has no probe and would give other masks, so it takes no more queries than that.
    limited = codec.one_by_one and evaluation.decoder == "latent_mean"
    return {
        # how a text becomes tokens; only a causal text encoder (CLIP's) may see its padding
        "max_tokens": model.max_tokens,
        "mask_padding": model.mask_padding or tower != "CLIPTextModel",
        "sentence_token": model.sentence_token,
        "text_skip_layers": model.text_skip_layers,
        # how latents become probabilities
        "decoder": evaluation.decoder,
        "ensemble_rule": evaluation.ensemble_rule,
        "scale": scale,
        # how queries become texts; "prompt" and "classes" are for closed codecs. "marks" are for those
        # whose texts are one token each, all in one context
        "templates": list(asked_templates(evaluation.templates, description.templates)),
        "prompt": codec.texts(description.classes)[0] if codec.closed else None,
        "classes": description.classes if codec.closed else None,
        "marks": None if (marks := codec.marks()) is None else np.round(marks, 4).tolist(),
        # how a mask image shows several classes: their colors, the last one for none of them
        "prototypes": state.get("prototypes"),
        "background": codec.background,
        "limit": evaluation.decode_limit if limited else 0,
    }
