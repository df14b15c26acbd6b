# SPDX-License-Identifier: Apache-2.0
"""The configuration's schema: frozen dataclasses with every key's name, type, default and limits.

This is the only place that knows a key's name, type, default, legal values, which tasks use it and
whether it changes what is trained. A config file starts from `default()` and sets what its experiment
needs; `parse` turns the result (with the command line's overrides) into a `Config`, or says which key
is wrong and what is legal.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Literal

from digseg_jax.config.sampling import NUM_TRAIN_TIMESTEPS


def setting(
    default: Any,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    names: tuple[str, ...] = (),
    prefixes: tuple[str, ...] = (),
    free: bool = False,
    tasks: tuple[str, ...] = (),
) -> Any:
    """Declares a field of the configuration, or a section of it, with what `parse` must know about it.

    Args:
        default: the value unless a file or the command line sets another.
        at_least, at_most, above, below: bounds of a number, or of each number of a list.
        names, prefixes: legal strings, and beginnings of other legal strings; a closed list is a
          `Literal` type instead.
        free: True if it does not change what is trained, so that a run may continue with another value.
        tasks: values of config.task that use it; all if empty. Other tasks reject it.
    """
    bounds = {"at_least": at_least, "at_most": at_most, "above": above, "below": below}
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    about = {"bounds": given, "names": names, "prefixes": prefixes, "free": free, "tasks": tasks}
    return dataclasses.field(default=default, metadata=about)


DATASETS = (
    "landcover", "landcover_igbp", "ade20k", "ade20k_847", "bdd100k", "camvid", "cityscapes",
    "coco_stuff", "deepglobe", "folder", "monuseg", "pascal_context_59", "pascal_context_459",
    "pascal_voc", "pascal_voc_21", "phenobench", "refuge2",
)  # fmt: skip
WITH_MASKS, WITH_TEXT = ("segmentation", "autoencoder"), ("segmentation", "prior")  # tasks


@dataclasses.dataclass(frozen=True)
class PartConfig:
    """A data set of a mixture: its place, how its images are cropped, what they may show unlabeled."""

    name: str = "landcover"
    root: str = ""
    weight: float = setting(1.0, above=0.0)  # share of the examples, relative to the other parts
    split: str = ""  # empty: the data set's training split
    folder: str = ""  # below config.data.root, for a part without a root of its own
    # Pixels of an image's short side at scale 1; 0: as config.data.scale_unit says.
    short_side: int = setting(0, at_least=0)
    # Range of the random scale; 0: config.data's.
    scale_min: float = setting(0.0, at_least=0.0)
    scale_max: float = setting(0.0, at_least=0.0)
    quarter_turns: bool = False  # turned by 0 to 3 quarters, as config.data.quarter_turns does for all
    jitter: float = setting(-1.0, at_least=-1.0, at_most=1.0)  # -1: config.data.jitter
    unasked: tuple[str, ...] = ()  # classes that nobody asks for by name, such as a background
    synonyms: tuple[str, ...] = ()  # more words for classes, as in a class list: "road, street, lane"
    # Kind of thing that its classes name; a part without one lends no names to other parts' images.
    group: str = ""
    # Groups and single names of other parts whose things its images may show without a label.
    may_show: tuple[str, ...] = ()
    held_out: str = ""  # regex on names of images that are not trained on; empty: none


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Data sets, the crops and queries of training, and augmentation."""

    # tfds:NAME is one of TensorFlow Datasets, prepared as array_record under root.
    name: str = setting("landcover", names=DATASETS, prefixes=("tfds:",))
    # Folder of the download as it unpacks, or of shards from
    # digseg_jax.tools.prepare_data; the land cover needs none.
    root: str = ""
    image_size: int = setting(64, at_least=1)  # pixels; side of the square training crop
    num_queries: int = setting(2, at_least=1, tasks=WITH_MASKS)  # per image in training
    # Share of a crop's queries whose class is not in it.
    negative_rate: float = setting(0.15, at_least=0.0, below=1.0, tasks=WITH_MASKS)
    # Repeat-factor sampling (LVIS) of images with rare classes: its threshold; 0 turns it off. Every
    # label is read at the start.
    repeat_threshold: float = setting(0.0, at_least=0.0)
    # Noise added to text tokens in training: its standard deviation, relative to the tokens' own.
    text_noise: float = setting(0.0, at_least=0.0, tasks=("segmentation",))
    # Share of training queries whose words are hidden, so that only the sentence token is left.
    word_dropout: float = setting(0.0, at_least=0.0, at_most=1.0, tasks=("segmentation",))
    # model.codec=prompted: share of images whose names are thinned out to a random number.
    name_dropout: float = setting(0.0, at_least=0.0, at_most=1.0, tasks=("segmentation",))
    split: str = ""  # the split that is trained on; empty: the data set's training split
    # Trains on these instead; `name` is still the data set that is evaluated.
    mixture: tuple[PartConfig, ...] = ()
    # Training prompts, {} for the class; empty: the data set's own.
    templates: tuple[str, ...] = setting((), tasks=("segmentation",))
    # Share of absent queries that name a class likely to occur in such an image (not in the paper).
    hard_negative_rate: float = setting(0.5, at_least=0.0, at_most=1.0)
    # Share of absent queries that name a class of another part, which the image cannot show (ours).
    foreign_rate: float = setting(0.0, at_least=0.0, at_most=1.0, tasks=("segmentation",))
    # Scale 1 of a training crop: the image's short side fills it, or its pixels are the image's own
    # (for images of one scale on the ground).
    scale_unit: Literal["short_side", "pixel"] = "short_side"
    scale_min: float = setting(0.5, above=0.0)  # range of the random scale (mmseg's)
    scale_max: float = setting(2.0, above=0.0)
    # Largest share of labeled pixels that one class may take in a crop (mmseg's cat_max_ratio).
    class_share_cap: float = setting(0.75, at_least=0.0, at_most=1.0)
    # Probability of a mirrored crop (mmseg, Marigold).
    flip: float = setting(0.5, at_least=0.0, at_most=1.0)
    # Crops are also turned by 0 to 3 quarters: images from above have no upright.
    quarter_turns: bool = False
    # Strength of color augmentation: 1 is mmseg's PhotoMetricDistortion, 0 none (not in the paper).
    jitter: float = setting(0.5, at_least=0.0, at_most=1.0)
    # Folder of latents that --mode=cache_latents wrote; training reads them instead of the images.
    latent_cache: str = setting("", tasks=("segmentation",))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Weights to start from, the text encoder, and how text and masks become their inputs."""

    # assets:NAME (shipped), a folder, or a hub id[:subfolder].
    vae: str = setting("assets:vae", tasks=WITH_TEXT)
    unet: str = setting("assets:prior", tasks=("segmentation",))  # the initial U-Net; same forms
    # random: the architecture of `unet`, from scratch.
    unet_init: Literal["pretrained", "random"] = setting("pretrained", tasks=("segmentation",))
    # minilm (pip package), a folder, a hub id, or a name of digseg_jax.weights.catalog.
    text: str = setting("minilm", tasks=WITH_TEXT)
    # Last layers of a CLIP text encoder to leave out; 1: the output of the penultimate layer.
    text_skip_layers: int = setting(0, at_least=0, tasks=WITH_TEXT)
    max_tokens: int = setting(16, at_least=1, tasks=WITH_TEXT)  # text length after padding
    # False: CLIP's padding tokens are attended to like any other, as Stable
    # Diffusion was trained. The padding of other text encoders is always masked.
    mask_padding: bool = setting(True, tasks=WITH_TEXT)
    # Append the mean token embedding: helps synonyms that were never trained (not in the paper).
    sentence_token: bool = setting(True, tasks=WITH_TEXT)
    text_adapters: bool = setting(True, tasks=WITH_TEXT)  # one per resolution, before the attention
    # adapter: the cross-attention reads the text. parallel: it reads the empty prompt, and a second one
    # beside it, which starts without effect, the text.
    text_injection: Literal["adapter", "parallel"] = setting("adapter", tasks=("segmentation",))
    # parallel: the text encoder that the U-Net was trained with; same forms as text. Empty: the one of
    # the U-Net's own pipeline, else that of the queries.
    unet_text: str = setting("", tasks=("segmentation",))
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; weights stay float32
    # binary: one query, one mask (open vocabulary; the paper does not say which it uses). palette: all
    # classes of a closed set in one pass, as colors. prompted: any data.num_queries names in one pass.
    codec: Literal["binary", "palette", "prompted"] = setting("binary", tasks=("segmentation",))


@dataclasses.dataclass(frozen=True)
class VaeArch:
    """Architecture of an autoencoder trained from scratch, and its losses (task=autoencoder)."""

    block_out_channels: tuple[int, ...] = setting((8, 16, 48, 96), at_least=1)
    layers_per_block: int = setting(1, at_least=1)
    norm_num_groups: int = setting(4, at_least=1)
    mid_block_add_attention: bool = False
    kl_weight: float = setting(5e-4, at_least=0.0)
    color_weight: float = setting(0.0, at_least=0.0)  # of the error of each latent cell's mean color
    # Initialize with a path that passes colors through exactly (models/vae_init.py).
    carry_colors: bool = False


@dataclasses.dataclass(frozen=True)
class UnetArch:
    """Architecture of a U-Net trained from scratch (task=prior)."""

    block_out_channels: tuple[int, ...] = setting((64, 96, 128), at_least=1)
    layers_per_block: int = setting(1, at_least=1)
    norm_num_groups: int = setting(16, at_least=1)
    attention_head_dim: tuple[int, ...] = setting((2, 3, 4), at_least=1)  # the number of heads
    # Which up blocks attend, lowest resolution first; every down block does. The highest one costs
    # a third of the time here and adds little: its skip connections come from a block that attends.
    up_attention: tuple[bool, ...] = (True, True, False)
    cross_attention_dim: int = setting(128, at_least=1)  # text adapters bring the tokens to this width


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """Noise schedule of the diffusion, and how training draws timesteps and noise."""

    prediction_type: Literal["v_prediction", "sample", "epsilon"] = "v_prediction"
    zero_snr: bool = True
    timestep_sampling: Literal["high_noise", "uniform"] = "high_noise"
    # high_noise: share of draws at the last timestep.
    terminal_fraction: float = setting(0.5, at_least=0.0, at_most=1.0)
    # Share of draws at the timesteps that a trailing sampler of sampler_steps visits, all equally often
    # (not in the paper): with 2 steps 999 and 499. The other draws follow timestep_sampling.
    sampler_share: float = setting(0.0, at_least=0.0, at_most=1.0)
    sampler_steps: int = setting(2, at_least=1, at_most=NUM_TRAIN_TIMESTEPS)
    noise: Literal["gaussian", "multires"] = "gaussian"


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The auxiliary losses beside the paper's MSE: on the clean latent and on the decoded mask."""

    # Weight of the mean absolute error of the clean latent that a prediction stands for (SDSeg: 1).
    x0_weight: float = setting(0.0, at_least=0.0)
    mask_weight: float = setting(0.0, at_least=0.0)  # of the loss on the decoded mask
    # Fraction of T from which it applies (noisy steps only).
    mask_from: float = setting(0.5, at_least=0.0, at_most=1.0)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW, its learning rate over the steps, and the moving average of the weights."""

    learning_rate: float = setting(1e-3, above=0.0)
    warmup_steps: int = setting(100, at_least=0)
    schedule: Literal["cosine", "constant", "exponential"] = "cosine"
    # Learning rate at the end, as a share of the peak.
    final_scale: float = setting(0.01, at_least=0.0, at_most=1.0)
    # constant: steps at the end over which the rate falls in a line to its final share; 0: none.
    cooldown_steps: int = setting(0, at_least=0)
    b2: float = setting(0.99, at_least=0.0, below=1.0)
    weight_decay: float = setting(0.0, at_least=0.0)
    clip_norm: float = setting(1.0, above=0.0)
    # 0: no moving average is kept; evaluation and export use the weights themselves.
    ema_decay: float = setting(0.995, at_least=0.0, below=1.0)
    # Type of Adam's first moment. The second stays float32: bfloat16 loses its updates at b2 = 0.999.
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    # Factor on the learning rate of the text's parameters that model.unet lacks (DiffDIS: 10).
    new_lr_scale: float = setting(1.0, above=0.0, tasks=("segmentation",))
    freeze: tuple[str, ...] = ()  # regexes on paths of parameters that stay fixed: "^down_blocks"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length of the training and size of its batches."""

    steps: int = setting(1000, at_least=0)
    batch_size: int = setting(8, at_least=1)  # images per step, over all hosts


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How the networks are computed: kernels, memory, compiled programs. Equal results to rounding."""

    # cpu: fewer products (models/kernels/conv.py); xla: XLA's own convolution; auto: by platform.
    conv: Literal["auto", "xla", "cpu"] = "auto"
    # chunked: bounded memory; headwise: CPU; splash: TPU; cudnn: NVIDIA GPU; auto: by platform.
    attention: Literal["plain", "auto", "chunked", "headwise", "splash", "cudnn"] = "plain"
    # plain: layer by layer; fused: one kernel, TPU; auto: by platform.
    feed_forward: Literal["auto", "plain", "fused"] = "auto"
    # What the backward pass computes again instead of keeping it, see models/remat.py.
    remat: Literal["none", "block", "large", "attention", "dots"] = "none"
    # Images that a device encodes at a time; 0: the whole batch.
    vae_batch: int = setting(0, at_least=0)
    # Masks that a device denoises at a time in evaluation; 0: all.
    unet_batch: int = setting(0, at_least=0)
    # Microbatches that a batch is split into: the same step in less memory. 0: as few as fit.
    accumulation: int = setting(1, at_least=0)
    # Folder of compiled programs; "": none. auto: one of the user's own, for predict and demo only.
    compile_cache: str = "auto"


@dataclasses.dataclass(frozen=True)
class LoadingConfig:
    """How examples are read: by how many processes, and what a damaged one does to the run."""

    # Grain worker processes; 0: threads of this process.
    workers: int = setting(0, at_least=0)
    # An unreadable example: stop, or log it, count it and use another.
    on_error: Literal["raise", "skip"] = "raise"


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh's axes; their product is the number of devices."""

    data: int = setting(-1, at_least=-1)  # -1: all remaining devices
    # Devices that share one state. 0: chosen from the chip and their number (mesh_choice.py).
    fsdp: int = setting(1, at_least=-1)
    tensor: int = setting(1, at_least=-1)  # devices that share a matrix of attention or feed-forward


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved and which checkpoints are kept."""

    every: int = setting(200, at_least=1)
    keep: int = setting(2, at_least=1)  # the newest ones
    keep_every: int = setting(0, at_least=0)  # steps; multiples are never removed; 0: none
    # Metric of the in-training evaluation whose best checkpoint is kept and exported; "": the last one.
    best: Literal["", "val_miou"] = ""
    timeout: float = setting(900.0, above=0.0)  # seconds of a save before the run stops


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """What is measured and written down while training."""

    every: int = setting(20, at_least=1)  # steps
    eval_every: int = setting(0, at_least=0, tasks=("segmentation",))  # steps; 0: only at the end
    # Images of val in that evaluation, evenly spread, at most eval.num_images; 0: eval.num_images.
    eval_images: int = setting(16, at_least=0, tasks=("segmentation",))
    # (first, last) step to trace into WORKDIR/profile.
    profile: tuple[int, ...] = ()
    # Write WORKDIR/examples: which examples each step saw.
    examples: bool = False
    # Project at Weights & Biases that gets the metrics too; "": none.
    wandb: str = ""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How masks are sampled, decoded and scored after training, and in prediction."""

    # held_out: of a suite of domains, the training images that are kept aside.
    split: Literal["test", "val", "held_out"] = "test"
    ensemble: int = setting(2, at_least=1)
    steps: int = setting(2, at_least=1, at_most=NUM_TRAIN_TIMESTEPS)
    spacing: Literal["trailing", "leading"] = "trailing"
    # How the members' probabilities are combined (not in the paper).
    ensemble_rule: Literal["mean", "median", "vote"] = "mean"
    # How mask latents become masks. latent_mean: decoded once, after the mean over members; vae: each
    # member decoded; probe: read from the latents, by a linear probe, of a palette the nearest color.
    decoder: Literal["latent_mean", "vae", "probe"] = "latent_mean"
    # latent_mean: number of masks of a view that are decoded, the probe's strongest first; the other
    # queries keep the probe's reading. 0: all masks are decoded.
    decode_limit: int = setting(24, at_least=0)
    # How an image becomes views of one size: overlapping windows, squeezed into one view, or scaled to
    # fit into one (the paper does not say). auto: the field's custom for the data set, else windows.
    inference: Literal["auto", "window", "whole", "aspect"] = "auto"
    # Pixels of a view: a side, or height and width; empty: the training crop.
    view_size: tuple[int, ...] = ()
    # window: pixels that an image's short side is scaled to; masks come back at the image's own
    # size. 0: scale 1 of the training crops if they are scaled by it, else the image's own size.
    short_side: int = setting(0, at_least=0)
    # How a class that no label shows enters the mean; auto: by the data set's own rule.
    absent_rule: Literal["auto", "mmseg", "detectron2", "official"] = "auto"
    # Prompts, {} for the class; empty: as the weights were trained. With n of them their probabilities
    # are averaged, which takes n times as long.
    templates: tuple[str, ...] = ()
    # Up to this many classes, all are asked for. Beyond, a coarse pass finds which are present (not in
    # the paper): at most `gate_limit` of them (16 to 32 of hundreds), with a score from `gate_cut` on.
    exhaustive_limit: int = setting(200, at_least=0)
    gate_limit: int = setting(16, at_least=1)
    gate_cut: float = 0.3
    # A CLIP that judges presence in place of the coarse pass, by image and names, without a cut.
    presence_model: str = ""
    # Views of a compiled call on each device. With 1, counts are the same integers on any devices.
    batch_size: int = setting(1, at_least=1)
    num_images: int = setting(0, at_least=0)  # 0: the whole split
    calibrate: bool = True  # fit scale and biases on calibrate_split, as in evaluation/fitting.py
    calibrate_split: Literal["val", "train"] = "val"  # train: for data sets without a third split
    calibrate_images: int = setting(0, at_least=0)  # images of that split; 0: num_images
    # Further samplings to score, rows of the E-Step table: "4x2", "4x2:leading".
    sweep: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class CompileConfig:
    """What --mode=compile compiles."""

    program: Literal["train", "eval"] = "train"  # the train step, or one batch of the evaluation
    unet_only: bool = False  # train: the U-Net's step on given latents and tokens, nothing else
    # Images per device; 0: as train.batch_size gives over all devices, or eval.batch_size on each.
    per_device_batch: int = setting(0, at_least=0)
    # eval: classes of the vocabulary; 0: those of config.data.
    eval_queries: int = setting(0, at_least=0)
    # exec_time_optimization_effort, from -1 to 1. A run is compiled with 0. -1 is for a
    # quick look: the reported memory is a tenth too low, and nothing is fetched ahead (aot/RECORD.md).
    effort: float = setting(0.0, at_least=-1.0, at_most=1.0)
    # TPUs: also search for the fastest tiling of every convolution, as a run does. That
    # is most of its compilation, and changes no number of the report but compile_seconds.
    tuned: bool = False
    advice: bool = True  # over budget: trace the step with other settings to find what would fit


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole experiment, section by section.

    Sections that are `free` do not change the trained weights: a run may continue with other values.
    """

    task: Literal["segmentation", "prior", "autoencoder"] = "segmentation"
    seed: int = setting(0, at_least=0, at_most=2**32 - 1)
    init_from: str = ""  # another run's working directory: start from its newest checkpoint's weights

    # What is trained: changing it makes another run.
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    vae_arch: VaeArch = setting(VaeArch(), tasks=("autoencoder",))
    unet_arch: UnetArch = setting(UnetArch(), tasks=("prior",))
    diffusion: DiffusionConfig = setting(DiffusionConfig(), tasks=("segmentation", "prior"))
    loss: LossConfig = setting(LossConfig(), tasks=("segmentation",))
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()

    # How it is computed, saved, logged and measured: free to change on resuming.
    compute: ComputeConfig = setting(ComputeConfig(), free=True)
    loading: LoadingConfig = setting(LoadingConfig(), free=True)
    mesh: MeshConfig = setting(MeshConfig(), free=True)
    checkpoint: CheckpointConfig = setting(CheckpointConfig(), free=True)
    logging: LoggingConfig = setting(LoggingConfig(), free=True)
    eval: EvalConfig = setting(EvalConfig(), free=True, tasks=("segmentation",))
    compile: CompileConfig = setting(CompileConfig(), free=True)


@dataclasses.dataclass(frozen=True)
class Setting:
    """The properties of one key, whether its field or its section declares them."""

    default: Any
    free: bool
    tasks: tuple[str, ...]


@functools.cache
def settings() -> dict[str, Setting]:
    """Every key of the configuration by its path, such as "train.steps"."""
    return dict(_settings(Config, "", Setting(None, free=False, tasks=())))


def is_free(key: str) -> bool:
    """True for a key that does not change what is trained.

    A key that no longer exists is judged by its section.
    """
    if key in settings():
        return settings()[key].free
    sections = {f.name: f.metadata for f in dataclasses.fields(Config)}
    section = sections.get(key.split(".")[0])
    return section is not None and section.get("free", False)


def _settings(cls: type, prefix: str, section: Setting) -> Iterator[tuple[str, Setting]]:
    """Yields (path, setting) for every key below a section; keys inherit what the section declares."""
    for field in dataclasses.fields(cls):
        free = section.free or field.metadata.get("free", False)
        tasks = field.metadata.get("tasks") or section.tasks
        setting = Setting(field.default, free, tasks)
        if dataclasses.is_dataclass(field.default):
            yield from _settings(type(field.default), f"{prefix}{field.name}.", setting)
        else:
            yield f"{prefix}{field.name}", setting
