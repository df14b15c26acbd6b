# SPDX-License-Identifier: Apache-2.0
"""segmenter.json, written beside exported weights: their origin, and the settings they depend on.

A U-Net's output means nothing without the schedule, the autoencoder and the text encoder that it was
trained with. The file holds those settings and the origin of the weights. Prediction therefore needs no
configuration, and a configuration that contradicts the training is rejected.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import re
import typing
from pathlib import Path
from typing import Any

import jax
import numpy as np

import digseg_jax
from digseg_jax import assets
from digseg_jax.arraytypes import Params
from digseg_jax.config.parse import check_key, flat, parse, to_dict
from digseg_jax.config.renamed import with_current_names
from digseg_jax.config.schema import Config, EvalConfig, ModelConfig
from digseg_jax.config.templates import check_template
from digseg_jax.data import vocabulary
from digseg_jax.data.sources import labels_of, parts_of
from digseg_jax.errors import UserError
from digseg_jax.io import storage
from digseg_jax.io.files import expanded
from digseg_jax.io.json_file import read_json
from digseg_jax.io.storage import AnyPath
from digseg_jax.io.workdir import EXPORT
from digseg_jax.packages import LIBRARIES
from digseg_jax.segmentation.codecs import CODECS
from digseg_jax.weights import catalog, minilm_folder, resolve
from digseg_jax.weights.hub import resolve_pipeline
from digseg_jax.weights.safetensors_io import weight_files

FILE = "segmenter.json"
SCHEMA = 1
# settings that prediction and evaluation must share with the training: others give wrong masks
BINDING = (
    "data.image_size",
    "data.scale_unit",
    "data.scale_min",
    "data.scale_max",
    "data.templates",
    "model.codec",
    "diffusion.prediction_type",
    "diffusion.zero_snr",
    "model.text_skip_layers",
    "model.max_tokens",
    "model.mask_padding",
    "model.sentence_token",
    "model.text_adapters",
    "model.text_injection",
)
# binding settings that are newer than some files -> the value that all earlier weights have
NEWER = {"model.text_injection": "adapter"}
CLOSED_BINDING = ("data.name",)  # binding too for a closed codec, which answers one class list only
# frozen parts may be named differently on another machine, so the checksums of their files count
PARTS = ("model.vae", "model.text")
# folders of an export: its own copies of the frozen parts, and its trained weights
OWN = {"model.vae": "vae", "model.text": "text_encoder"}
UNET = "unet"
# settings of the run's evaluation: the defaults of prediction and evaluation with these weights. The
# model of a gate may be a folder of this machine, so it is none of them.
SUGGESTED = (
    "model.dtype",
    "data.split",
    *(f"eval.{f.name}" for f in dataclasses.fields(EvalConfig) if f.name != "presence_model"),
)
REQUIRED = (*BINDING, *CLOSED_BINDING, *PARTS)


@dataclasses.dataclass(frozen=True)
class FrozenPart:
    """The autoencoder or the text encoder of a run.

    reference: the part as the configuration names it. revision: commit of the hub's repository; "" for
    a part that is not from the hub. sha256: checksum of its weight files, hexadecimal.
    """

    reference: str
    revision: str
    sha256: str

    @classmethod
    def find(cls, reference: str) -> FrozenPart:
        """Finds a part here or on the hub and computes its checksum; UserError if it is missing."""
        # A relative path must mean the same from another working directory.
        folder, place = part_folder(reference), expanded(reference)
        reference = str(place.absolute()) if place.exists() else reference

        # The hub's cache names the folder of a download after its commit; a folder has none of its own.
        commit = re.search(r"/snapshots/([0-9a-f]{40})(/|$)", folder.as_posix())
        known = commit[1] if commit and not place.exists() else ""
        return cls(reference, known, checksum(folder))

    @property
    def pinned(self) -> str:
        """The reference, of a part from the hub with its "@commit": a branch may have moved."""
        if not self.revision:
            return self.reference
        repository, colon, subfolder = catalog.expand(self.reference).partition(":")
        return f"{repository.partition('@')[0]}@{self.revision}{colon}{subfolder}"


@dataclasses.dataclass(frozen=True)
class Description:
    """The content of segmenter.json.

    config: the settings `REQUIRED` and `SUGGESTED`, as sections of a configuration.
    vae, text: the frozen parts. classes: class names of the data set that the run evaluates, or all
    that a mixture's queries name.
    templates: prompts of the training, {} for a class: the configuration's, or the data sets' own.
    parameters: number of trained parameters. datasets: names of the training data sets.
    steps, checkpoint: finished training steps, and their checkpoint below the working directory.
    started_from: the weights at step 0. versions: library -> version; empty if not recorded.
    synonyms: further words that the training asked with; none in files of earlier versions.
    """

    schema: int
    config: dict[str, Any]
    vae: FrozenPart
    text: FrozenPart
    classes: list[str]
    templates: list[str]
    parameters: int
    datasets: list[str]
    steps: int
    checkpoint: str
    started_from: str
    seed: int
    versions: dict[str, str]
    synonyms: list[str] = dataclasses.field(default_factory=list)

    def recorded_config(self) -> Config:
        """The default configuration with the recorded settings; frozen parts need not exist here."""
        return dataclasses.replace(_config_of(_recorded(self.config)), seed=self.seed)

    def training_config(self, folder: Path | None = None) -> Config:
        """The default configuration with the recorded settings, and frozen parts that can be loaded.

        folder: of the weights; its own copies of the frozen parts are preferred.

        Raises:
          UserError: a recorded folder is not on this machine.
        """
        parts = dict(zip(PARTS, (self.vae, self.text), strict=True))
        own = own_parts(folder)

        # Paths of another machine are reported here, with the flag that names a copy.
        for key, part in parts.items():
            if key in own:
                continue
            if part.reference.startswith(("/", ".", "~")) and not Path(part.reference).exists():
                raise UserError(
                    f"{FILE}: config.{key}={part.reference!r} is not on this machine; name a copy with "
                    f"--config=FILE --config.{key}=FOLDER"
                )

        # The folder's own copies win over the hub's parts at their recorded commits.
        values = _recorded(self.config) | {key: part.pinned for key, part in parts.items()} | own
        return dataclasses.replace(_config_of(values), seed=self.seed)

    def with_pinned_parts(self, model: ModelConfig, folder: Path | None = None) -> ModelConfig:
        """The settings of a model with the frozen parts of the training.

        They are the copies in the folder of the weights, or the hub's parts at their recorded commits.
        """
        own = own_parts(folder)

        # A part that the user replaced keeps its name: `check_agreement` has compared its weights.
        for name, part in (("vae", self.vae), ("text", self.text)):
            if catalog.expand(getattr(model, name)) == catalog.expand(part.reference):
                pinned: dict[str, Any] = {name: own.get(f"model.{name}", part.pinned)}
                model = dataclasses.replace(model, **pinned)
        return model

    def provenance(self) -> dict[str, Any]:
        """The facts about the weights that go beside a table of scores."""
        names = ("parameters", "datasets", "steps", "checkpoint", "started_from", "seed", "versions")
        parts = {"vae": self.vae.sha256, "text": self.text.sha256}
        return {name: getattr(self, name) for name in names} | {"parts": parts}


def describe(config: Config, abstract: Params, steps: int = 0, checkpoint: str = "") -> Description:
    """Describes the weights that a run of `config` trains; reads its frozen parts.

    abstract: the parameters, or their shapes. steps, checkpoint: see `Description`.

    Raises:
      UserError: a frozen part is missing.
    """
    # Only the settings that matter to the weights, not the whole configuration.
    values = to_dict(config)
    sections: dict[str, Any] = {}
    for key in (*REQUIRED, *SUGGESTED):
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = values[section][name]

    # A run starts from a checkpoint of the whole segmenter, a pretrained U-Net, or random weights.
    start = config.model.unet if config.model.unet_init == "pretrained" else "random weights"
    return Description(
        schema=SCHEMA,
        config=sections,
        vae=FrozenPart.find(config.model.vae),
        text=FrozenPart.find(config.model.text),
        classes=list(vocabulary.trained_names(config.data) or vocabulary.class_names(config.data)),
        templates=list(vocabulary.training_templates(config.data)),
        parameters=sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract)),
        datasets=list(labels_of(parts_of(config.data))),
        steps=steps,
        checkpoint=checkpoint,
        started_from=config.init_from or start,
        seed=config.seed,
        versions=installed_versions(),
        synonyms=list(vocabulary.trained_synonyms(config.data)),
    )


def installed_versions() -> dict[str, str]:
    """Versions of this package and of the libraries that training depends on."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"digseg_jax": digseg_jax.__version__} | found


def write_description(folder: AnyPath, description: Description) -> None:
    """Writes FOLDER/segmenter.json; parts inside the folder are named relative to it, as ./NAME."""
    vae, text = _inside(folder, description.vae), _inside(folder, description.text)
    values = dataclasses.asdict(dataclasses.replace(description, vae=vae, text=text))

    # The recorded settings name the parts a second time; both names must agree.
    values["config"]["model"] |= {"vae": vae.reference, "text": text.reference}
    storage.write_json(folder / FILE, values)


def _inside(folder: AnyPath, part: FrozenPart) -> FrozenPart:
    """The part, with a reference relative to `folder` if it lies inside, so that both move together."""
    base = os.path.abspath(folder)
    if not part.reference.startswith(base + os.sep):
        return part
    return dataclasses.replace(part, reference=f"./{os.path.relpath(part.reference, base)}")


def read_description(folder: AnyPath) -> Description:
    """Reads FOLDER/segmenter.json.

    Raises:
      UserError: no such file, another schema, or a key that is missing, unknown or of another type.
    """
    path = folder / FILE
    with storage.explained(path, "cannot be read"):
        present = path.exists()
    if not present:
        raise UserError(
            f"{path}: missing, so nothing says how these weights were trained; write it with "
            "--mode=export and the run's own --config and --workdir"
        )

    # The file's form: JSON, an object, and a schema that this version knows.
    values = read_json(path, remedy="write it again with --mode=export")
    if values.get("schema") != SCHEMA:
        raise UserError(
            f"{path}: schema={values.get('schema')!r}, this program reads {SCHEMA}; write it again "
            "with --mode=export, or use the version that wrote it"
        )

    # Keys that were renamed since the file was written get their current names first.
    if isinstance(values.get("config"), dict):
        values["config"] = with_current_names(values["config"])
    description = _typed(Description, values, str(path))
    description = dataclasses.replace(
        description, vae=_outside(folder, description.vae), text=_outside(folder, description.text)
    )

    # Values are checked now, so that an error names this file. Without any template, None fails.
    for template in description.templates or [None]:
        check_template(template, f"{path}: templates")
    try:
        _config_of(_recorded(description.config))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return description


def _outside(folder: AnyPath, part: FrozenPart) -> FrozenPart:
    """The part with an absolute reference; the inverse of `_inside`."""
    if not part.reference.startswith("./"):
        return part
    place = folder / part.reference[2:]
    reference = str(place) if storage.is_remote(str(place)) else os.path.abspath(place)
    return dataclasses.replace(part, reference=reference)


def own_parts(folder: AnyPath | str | None) -> dict[str, str]:
    """An export's own copies of frozen parts, {"model.vae": FOLDER/vae, ...}; older ones have none."""
    if folder is None:
        return {}
    found = {key: Path(folder) / name for key, name in OWN.items()}
    return {key: str(path) for key, path in found.items() if path.is_dir()}


def unet_folder(folder: Path) -> Path:
    """Folder of exported weights: FOLDER/unet, or FOLDER itself in exports of older versions."""
    return folder / UNET if (folder / UNET).is_dir() else folder


def check_agreement(description: Description, values: dict[str, Any], folder: AnyPath | str) -> None:
    """Checks that a configuration's `to_dict` agrees with the one that the weights were trained with.

    Raises:
      UserError: it contradicts the training; names every such key with both values.
    """
    closed = CODECS[_at(values, "model.codec")].closed
    different = []
    for key in (*BINDING, *(CLOSED_BINDING if closed else ())):
        trained, asked = _at(description.config, key), _at(values, key)
        if trained != asked:
            different.append(f"config.{key}={asked!r}, trained with {trained!r}")

    # Frozen parts are compared by name, and by checksum if the names differ: a folder may have moved.
    for key, part in zip(PARTS, (description.vae, description.text), strict=True):
        asked = _at(values, key)
        known = catalog.expand(part.reference), part.pinned, own_parts(folder).get(key)
        if catalog.expand(asked) in known:
            continue
        if checksum(part_folder(asked)) != part.sha256:
            different.append(f"config.{key}={asked!r} has other weights than {part.reference!r}")

    if different:
        raise UserError(
            f"{folder}: {'; '.join(different)}; the masks would be wrong: use the configuration of the "
            "training, or leave it out: the weights bring their own"
        )


def find_export(model: str) -> Path:
    """Finds exported weights and returns their local folder, downloaded if need be.

    model: an export, a run's working directory, either of them on gs://, assets:NAME, or a hub id.

    Raises:
      UserError: there are no weights, or the bucket or the hub cannot be read.
    """
    # A working directory holds its export in a folder of its own.
    spec = assets.resolve(model)
    if storage.is_remote(spec) or expanded(spec).exists():
        place = storage.as_path(spec)
        with storage.explained(place, "cannot be read"):
            inside = place / EXPORT
            place = inside if inside.is_dir() else place
        spec = str(place)

    # An existing folder may still be a run that has exported nothing.
    folder = resolve_pipeline(spec)
    if not any(unet_folder(folder).glob("*.safetensors")):
        raise UserError(
            f"{model}: no trained weights here; run --mode=train first, or --mode=export for the "
            "newest checkpoint of a run that is not finished"
        )
    return folder


def part_folder(reference: str) -> Path:
    """The local folder of an autoencoder or a text encoder, downloaded if need be."""
    return minilm_folder() if reference == "minilm" else resolve(assets.resolve(reference))


def checksum(folder: Path) -> str:
    """SHA-256 of a component's weight files, in hexadecimal digits."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        with path.open("rb") as file:
            # Blocks of 4 MiB: a text encoder can be larger than the memory to spare.
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def _recorded(sections: dict[str, Any]) -> dict[str, Any]:
    """Settings by key, such as "data.image_size", from the sections of a file.

    Raises:
      UserError: a required setting is missing (suggested ones may be), or one is unknown.
    """
    for key in flat(sections):
        check_key(f"config.{key}")
    found = {key: _at(sections, key) for key in REQUIRED}

    # Suggested settings that the file lacks keep the configuration's defaults.
    for key in SUGGESTED:
        section, name = key.split(".")
        if name in sections.get(section, {}):
            found[key] = sections[section][name]
    return found


def _at(sections: dict[str, Any], key: str) -> Any:
    """The value of a key such as "data.image_size", or of `NEWER`; raises UserError without one."""
    section, name = key.split(".")
    values = sections.get(section)
    if not isinstance(values, dict) or name not in values:
        if key in NEWER:
            return NEWER[key]
        raise UserError(f"config.{key} is missing; write the file again with --mode=export")
    return values[name]


def _config_of(values: dict[str, Any]) -> Config:
    """The default configuration with these values by key; raises UserError for an illegal value."""
    tree = to_dict(Config())
    for key, value in values.items():
        section, name = key.split(".")
        tree[section][name] = value
    return parse(tree)


def _typed(cls: type, values: dict[str, Any], path: str) -> Any:
    """Builds a dataclass from a JSON object that has each field without a default and no other key.

    Raises:
      UserError: a missing or unknown key, or a value of another type; `path` leads the message.
    """
    hints = typing.get_type_hints(cls)
    newer = {f.name for f in dataclasses.fields(cls) if f.default_factory is not dataclasses.MISSING}
    if missing := sorted(hints.keys() - values.keys() - newer):
        raise UserError(f"{path}: {', '.join(missing)} missing; write it again with --mode=export")
    if unknown := sorted(values.keys() - hints.keys()):
        raise UserError(f"{path}: {unknown[0]!r} is not one of its keys; legal: {', '.join(hints)}")

    # Check types, nested dataclasses included; JSON's true and false are no integers here.
    made = {}
    for name, value in values.items():
        hint = hints[name]
        outer = typing.get_origin(hint) or hint
        if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, dict):
            made[name] = _typed(hint, value, f"{path}: {name}")
        elif isinstance(value, outer) and not isinstance(value, bool):
            made[name] = value
        else:
            said = getattr(outer, "__name__", str(outer))
            raise UserError(f"{path}: {name}={value!r}: expected {said}, got {type(value).__name__}")
    return cls(**made)
