# SPDX-License-Identifier: Apache-2.0
"""Everything small that the tests share: models in the hub's layout, a config, batches, meshes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from digseg_jax import trees
from digseg_jax.aot.shapes import Architecture, abstract_parts
from digseg_jax.arraytypes import Params
from digseg_jax.config.parse import parse, to_dict
from digseg_jax.config.schema import Config, MeshConfig, settings
from digseg_jax.data.captions import Captions
from digseg_jax.data.datasets import landcover, registry
from digseg_jax.data.datasets.landcover_prompts import HELD_OUT, PROMPTS
from digseg_jax.errors import UserError
from digseg_jax.models import functional
from digseg_jax.models.text.bert import BertConfig, BertModel
from digseg_jax.models.text_branch import ZERO_INIT
from digseg_jax.models.unet import DOWN_TYPES, UP_TYPES, UNet2DConditionModel, UNetConfig
from digseg_jax.models.vae import AutoencoderKL, VaeConfig
from digseg_jax.prediction.description import describe
from digseg_jax.prediction.export import complete_export
from digseg_jax.runtime.sharding import make_mesh
from digseg_jax.training.loop import Trainer
from digseg_jax.training.setup import Setup
from digseg_jax.training.step import make_train_step
from digseg_jax.training.tasks.base import Task
from digseg_jax.training.tasks.parts import Parts, choose_kernels, load_parts
from digseg_jax.training.tasks.segmentation import SegmentationTask
from digseg_jax.weights import save_component

SIZE = 32  # pixels of a crop; 8 latent cells
VAE = VaeConfig(
    block_out_channels=(4, 4, 8),
    layers_per_block=1,
    norm_num_groups=2,
    mid_block_add_attention=False,
    scaling_factor=0.7,
    sample_size=SIZE,
)
UNET = UNetConfig(
    sample_size=8,
    block_out_channels=(8, 16),
    down_block_types=(DOWN_TYPES[0], DOWN_TYPES[1]),  # few attentions: they take long to compile
    up_block_types=(UP_TYPES[1], UP_TYPES[0]),
    layers_per_block=1,
    norm_num_groups=4,
    attention_head_dim=2,
    cross_attention_dim=8,
    use_linear_projection=True,
)
TEXT_WIDTH = 16
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def random_params(model_class: type, config: Any, seed: int) -> Any:
    """Host arrays of a model, fast: nothing is compiled."""
    _, abstract = functional.abstract(lambda: model_class(config, rngs=functional.FixedRngs()))
    return functional.random_init(abstract, seed)


def write_folders(folder: Path) -> dict[str, str]:
    """Writes folder/{vae,unet,text}; returns their paths."""
    save_component((VAE, random_params(AutoencoderKL, VAE, 1)), folder / "vae")
    save_component((UNET, random_params(UNet2DConditionModel, UNET, 2)), folder / "unet")
    named = [text for classes in PROMPTS.values() for texts in classes.values() for text in texts]
    prompts = [*named, *Captions(registry.spec("landcover")).texts, *HELD_OUT]
    words = sorted({w for p in prompts for w in re.findall(r"\w+|[^\w\s]", p)})
    bert = BertConfig(
        vocab_size=len(SPECIAL) + len(words),
        hidden_size=TEXT_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=24,
    )
    params = random_params(BertModel, bert, 3)
    # words must differ by more than the default deviation of 0.02, or all queries look alike
    words_table = params["embeddings"]["word_embeddings"]
    words_table["embedding"] = 50.0 * words_table["embedding"]
    save_component((bert, params), folder / "text")
    (folder / "text" / "vocab.txt").write_text("\n".join([*SPECIAL, *words]) + "\n")
    return {name: str(folder / name) for name in ("vae", "unet", "text")}


def narrow_text(folders) -> str:
    """A text tower whose tokens have the cross-attention's own width."""
    folder = Path(folders["text"]).parent / "narrow_text"
    vocab = (Path(folders["text"]) / "vocab.txt").read_text()
    bert = BertConfig(
        vocab_size=len(vocab.split("\n")) - 1,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=24,
    )
    save_component((bert, random_params(BertModel, bert, 5)), folder)
    (folder / "vocab.txt").write_text(vocab)
    return str(folder)


def uses(task: str, key: str) -> bool:
    tasks = settings()[key].tasks
    return not tasks or task in tasks


def values(folders: dict[str, str], **changes: Any) -> dict[str, Any]:
    """A complete tiny configuration as a dict; changes are written as `train__steps=3`."""
    small = {
        "data__image_size": SIZE,
        "model__vae": folders["vae"],
        "model__unet": folders["unet"],
        "model__text": folders["text"],
        "model__max_tokens": 20,
        "unet_arch__block_out_channels": (8, 16),
        "unet_arch__norm_num_groups": 4,
        "unet_arch__attention_head_dim": (2, 2),
        "unet_arch__up_attention": (False, True),
        "unet_arch__cross_attention_dim": 8,
        "vae_arch__block_out_channels": (4, 4, 8),
        "vae_arch__norm_num_groups": 2,
        "optim__warmup_steps": 0,
        "train__steps": 4,
        "logging__every": 1,
        "checkpoint__every": 2,
        "eval__ensemble": 1,
        "eval__steps": 1,
        "eval__num_images": 2,
        "eval__batch_size": 1,
        "eval__calibrate": False,
        "eval__view_size": (128,),  # a tile of the land cover
    }
    if changes.get("data__name", "landcover").startswith("landcover"):
        small |= {
            "data__scale_unit": "pixel",
            "data__scale_min": 1.0,
            "data__scale_max": 1.0,
            "data__class_share_cap": 1.0,
            "data__jitter": 0.0,
        }
    task = changes.get("task", "segmentation")
    used = {key: value for key, value in small.items() if uses(task, key.replace("__", "."))}
    tree = to_dict(Config())
    for key, value in (used | changes).items():
        *parents, leaf = key.split("__")
        node = tree
        for parent in parents:
            node = node[parent]
        assert leaf in node, key
        node[leaf] = value
    return tree


def config(folders: dict[str, str], **changes: Any) -> Config:
    return parse(values(folders, **changes))


def config_file(folder: Path, folders: dict[str, str], **changes: Any) -> Path:
    """A config file for `main` with the same content as `config`."""
    path = folder / "tiny_config.py"
    path.write_text(
        "import ml_collections\n\n\ndef get_config():\n"
        f"    return ml_collections.ConfigDict({values(folders, **changes)!r}).lock()\n"
    )
    return path


def load_task(config: Config, prompts: tuple[str, ...]) -> SegmentationTask:
    """The segmentation task of a configuration, with a bank of these prompts."""
    parts = load_parts(config.data, config.model, config.compute, config.loss, prompts)
    return SegmentationTask(config, parts)


def for_devices(config: Config, devices: Sequence[Any]) -> Config:
    """The configuration with the kernels that "auto" stands for on the devices."""
    kernels = choose_kernels(config.compute, devices, config.model.dtype, config.mesh.tensor)
    return dataclasses.replace(config, compute=kernels)


def shapes_of(
    config: Config, architecture: Architecture | None = None, prompts: int | None = None
) -> Parts:
    """The parts of the configuration's segmentation task as mere shapes."""
    sections = config.data, config.model, config.compute, config.loss
    return abstract_parts(*sections, architecture, prompts)


def trainer(config: Config, task: Task, mesh: Mesh, folder: Any, **options: bool) -> Trainer:
    """The trainer of a task in a folder."""
    return Trainer(Setup(config, task, mesh), str(folder), **options)


def export(
    config: Config,
    folder: Path,
    prompts: tuple[str, ...] = ("water",),
    change: Callable[[Params], Params] = lambda params: params,
) -> None:
    """What a segmentation run of the configuration exports, of weights that were never trained.

    change: applied to the weights of step 0.
    """
    task = load_task(config, prompts)
    if not task.codec.one_by_one:  # its colors are chosen before the training
        task.prepare()
    task.export(change(jax.device_get(task.initial())), folder, {"task": "test"})
    complete_export(folder, describe(config, task.abstract, 0, "checkpoints/0"))


def train_step(task: Task, config: Config, mesh: Mesh, shardings: tuple[Any, Any]) -> Any:
    """The configuration's train step. shardings: of the state and of the frozen parts."""
    options = {"steps": config.train.steps, "accumulation": config.compute.accumulation}
    return make_train_step(task, mesh, *shardings, config.optim, seed=config.seed, **options)


def without_zeros(params: Params) -> Params:
    """The parameters with random values where training starts from zero, so that all of them matter."""
    rng = np.random.default_rng(5)
    return trees.unflatten(
        {
            path: 0.3 * rng.standard_normal(x.shape, np.float32) if re.search(ZERO_INIT, path) else x
            for path, x in trees.flatten(params).items()
        }
    )


def batch(n: int = 8, q: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """A made-up training batch; every class occurs and every example has its own index."""
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (n, SIZE, SIZE, 3), np.uint8),
        "label": rng.integers(0, 8, (n, SIZE // 8, SIZE // 8)).repeat(8, 1).repeat(8, 2)
        .astype(np.int32),
        "query": rng.integers(0, 40, (n, q), np.int32),
        "query_class": rng.integers(0, 8, (n, q), np.int32),
        "index": np.arange(n, dtype=np.uint32),
    }  # fmt: skip


def mesh(data: int = 1, fsdp: int = 1, tensor: int = 1):
    """A mesh over the first data * fsdp * tensor of the simulated devices."""
    devices = jax.devices()[: data * fsdp * tensor]
    return make_mesh(MeshConfig(data, fsdp, tensor), devices)


def bytes_on_a_device(tree: Any) -> int:
    """Bytes of a tree's arrays that the first device holds."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def land_cover() -> landcover.LandCover:
    try:
        return landcover.load()
    except UserError as error:
        if "not installed" not in str(error):
            raise
        pytest.skip(str(error))


def one_line(error: BaseException) -> str:
    """The message; fails unless it is a single line."""
    text = str(error)
    assert "\n" not in text and text.strip(), text
    return text
