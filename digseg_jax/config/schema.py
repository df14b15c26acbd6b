# SPDX-License-Identifier: Apache-2.0
"""The configuration: frozen dataclasses with defaults, made from a locked ConfigDict.

The dataclasses are the only place that knows names, types, defaults and legal values. A config file
starts from `default()`, sets what its experiment needs, and `parse` turns the result (with the
command line's overrides) into a `Config`, or says which key is wrong and what is legal.
"""

from __future__ import annotations

import dataclasses
from typing import Any


def legal(*values: str, prefixes: tuple[str, ...] = ()) -> Any:
    """A string field restricted to `values` (the first is the default) and what begins so."""
    return dataclasses.field(default=values[0], metadata={"legal": values, "prefixes": prefixes})


@dataclasses.dataclass(frozen=True)
class PartConfig:
    """A data set of a mixture."""

    name: str = "landcover"
    root: str = ""
    weight: float = 1.0  # share of the examples, relative to the other parts
    split: str = ""  # empty: the data set's training split


@dataclasses.dataclass(frozen=True)
class DataConfig:
    name: str = legal(
        "landcover",
        "landcover_igbp",
        "ade20k",
        "ade20k_847",
        "bdd100k",
        "camvid",
        "cityscapes",
        "coco_stuff",
        "deepglobe",
        "folder",
        "monuseg",
        "pascal_context_59",
        "pascal_context_459",
        "pascal_voc",
        "phenobench",
        "refuge2",
        prefixes=("tfds:",),  # tfds:NAME, prepared as array_record under root
    )
    # the download as it unpacks, or shards of digseg_jax.tools.prepare_data; the land cover needs none
    root: str = ""
    label_set: str = legal("groups", "igbp")  # what evaluation and its queries use
    train_label_sets: tuple[str, ...] = ("groups",)  # where training draws its queries from
    image_size: int = 64  # pixels; a side of the square training crop
    num_queries: int = 2  # queries per image in training
    negative_rate: float = 0.15  # share of queries whose class is absent from the crop
    repeat_threshold: float = 0.0  # repeat-factor sampling of rare classes' tiles; 0: off
    text_noise: float = 0.0  # deviation of noise on text tokens in training, in token deviations
    word_dropout: float = 0.0  # share of training queries that show the sentence token alone
    workers: int = 0  # grain worker processes; 0: threads of this process
    # the rest is for every data set but the land cover
    train_split: str = ""  # empty: the data set's own
    mixture: tuple[PartConfig, ...] = ()  # trains on these instead; name stays what is evaluated
    templates: tuple[str, ...] = ()  # training prompts, {} for the class; empty: the data set's own
    hard_negative_rate: float = 0.5  # share of negatives that one would expect here (ours)
    scale_min: float = 0.5  # large-scale jitter: at 1 the short side fills the crop (mmseg's range)
    scale_max: float = 2.0
    class_share_cap: float = 0.75  # of labelled pixels in a crop (mmseg's cat_max_ratio); 1: off
    flip: float = 0.5  # probability of a mirrored crop (mmseg, Marigold)
    jitter: float = 0.5  # of colours; 1: mmseg's PhotoMetricDistortion, 0: off (ours: half of it)
    on_error: str = legal("raise", "skip")  # a broken example: stop, or count, log and replace it
    # made by --mode=cache_latents and trained from instead of the pictures: a folder or gs://; "": none
    latent_cache: str = ""


@dataclasses.dataclass(frozen=True)
class VaeArch:
    """Architecture of an autoencoder trained from scratch, and its losses (task=autoencoder)."""

    block_out_channels: tuple[int, ...] = (8, 16, 48, 96)
    layers_per_block: int = 1
    norm_num_groups: int = 4
    mid_block_add_attention: bool = False
    kl_weight: float = 5e-4
    color_weight: float = 0.0  # of the error of each latent cell's mean colour; 0: off
    carry_colors: bool = False  # start with a path that carries colours exactly (models/vae_init.py)


@dataclasses.dataclass(frozen=True)
class UnetArch:
    """Architecture of a U-Net trained from scratch (task=prior)."""

    block_out_channels: tuple[int, ...] = (64, 96, 128)
    layers_per_block: int = 1
    norm_num_groups: int = 16
    attention_head_dim: tuple[int, ...] = (2, 3, 4)  # diffusers' name for the number of heads
    # which up blocks attend, lowest resolution first; every down block does. The highest one costs a
    # third of the time here and adds little: its skip connections come from a block that attends
    up_attention: tuple[bool, ...] = (True, True, False)
    cross_attention_dim: int = 128  # text adapters bring the tokens to this width


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    vae: str = "assets:vae"  # assets:NAME (shipped), a folder, or a hub id[:subfolder]
    unet: str = "assets:prior"  # where the U-Net starts; same forms
    unet_init: str = legal("pretrained", "random")  # random: that architecture, from scratch
    text: str = (
        "minilm"  # minilm (pip package), a folder, a hub id, or a name of digseg_jax.weights.catalog
    )
    text_skip_layers: int = 0  # last layers of a CLIP tower to leave out; 1: the penultimate's output
    max_tokens: int = 16  # text length after padding
    # False: a CLIP tower's padding is text like any other, for the tower and for cross-attention, as
    # Stable Diffusion was trained; that of other towers is masked always
    mask_padding: bool = True
    # one more token, the mean of a prompt's own: neighbours of a name mean the same to it (ours)
    sentence_token: bool = True
    text_adapters: bool = True  # one per resolution, between text tokens and cross-attention
    dtype: str = legal("float32", "bfloat16")  # of activations; weights stay float32
    # cpu: fewer products, see models/kernels/conv.py; xla: as XLA has it; auto: by platform. All give
    # the same result up to rounding
    conv: str = legal("auto", "xla", "cpu")
    # chunked: bounded memory on any platform; headwise: CPU; splash: TPU; cudnn: NVIDIA GPU; auto: the
    # one of these for the devices. Equal in result
    attention: str = legal("plain", "auto", "chunked", "headwise", "splash", "cudnn")
    # plain: layer by layer; fused: one kernel, TPU; auto: the one of these for the devices
    feed_forward: str = legal("auto", "plain", "fused")
    remat: str = legal("none", "block", "large", "attention", "dots")  # see models/remat.py
    vae_limit: int = 0  # pictures that the autoencoder takes at a time on a device; 0: all of a batch
    unet_limit: int = 0  # masks that the U-Net denoises at a time on a device in evaluation; 0: all
    vae_arch: VaeArch = VaeArch()
    unet_arch: UnetArch = UnetArch()


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    prediction_type: str = legal("v_prediction", "sample", "epsilon")
    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    zero_snr: bool = True
    timestep_sampling: str = legal("high_noise", "uniform")
    terminal_fraction: float = 0.5  # high_noise: share of draws at the last timestep
    high_noise_a: float = 0.1  # high_noise: scale of the heavy tail (METHOD: GenMask's a)
    mask_loss_weight: float = 0.0  # of the auxiliary loss on the predicted mask; 0: the paper's MSE
    mask_loss_from: float = 0.5  # the auxiliary loss counts at timesteps from this share of T on
    noise: str = legal("gaussian", "multires")
    multires_strength: float = 0.9  # multires: annealed as strength * t / T (Marigold)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    schedule: str = legal("cosine", "constant", "exponential")
    final_scale: float = 0.01  # learning rate at the end, as a share of the peak
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.995  # 0: no average is kept; evaluation and export use the weights
    # of Adam's first moment; the second stays float32, bfloat16 loses its updates at b2 = 0.999
    mu_dtype: str = legal("float32", "bfloat16")
    freeze: tuple[str, ...] = ()  # regexes on parameter paths that stay fixed: "^down_blocks"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000
    batch_size: int = 8  # images per step, over all hosts
    log_every: int = 20
    eval_every: int = 0  # 0: only at the end
    accumulation: int = 1  # parts of the batch, taken in turn: the same step in less memory
    profile: tuple[int, ...] = ()  # (first, last) step to trace into WORKDIR/profile
    compile_cache: str = ""  # folder of compiled programs, kept over runs and restarts; "": none
    wandb: str = ""  # project at Weights & Biases that gets the metrics too; "": none
    log_examples: bool = False  # write WORKDIR/examples: which examples each step saw


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = 200
    keep: int = 2  # the newest ones
    keep_every: int = 0  # steps; those at its multiples are never removed; 0: none
    best: str = ""  # metric of the in-training evaluation (val_miou); its best is kept and exported
    # steps that may run while a save is being written; then the loop waits for it, so that a kill
    # costs no more than `every` + overlap - 1 finished steps. 0: no limit (ours)
    overlap: int = 1
    timeout: float = 900.0  # seconds that a save may take before the run stops; ours


@dataclasses.dataclass(frozen=True)
class SegmentationConfig:
    # binary: one query, one mask (open vocabulary; the paper does not say which it uses).
    # palette: every class of a closed set in one pass, as colours
    codec: str = legal("binary", "palette")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    split: str = legal("test", "val")
    ensemble: int = 2
    steps: int = 2
    spacing: str = legal("trailing", "leading")
    ensemble_rule: str = legal("mean", "median", "vote")  # of the members' probabilities (ours)
    # how mask latents become masks: decoded once, after the mean over members; each member decoded;
    # or read from the latents without a decoder: by a linear probe, a palette's by the nearest color
    decoder: str = legal("latent_mean", "vae", "probe")
    # latent_mean: masks of a view that are decoded, those that the probe puts first; the other queries
    # keep the probe's reading. 0: all of them
    decode_limit: int = 24
    # how an image becomes views of one size: overlapping windows, squeezed into one, or scaled to fit
    # into one (the paper is silent). auto: as its data set is evaluated in the field, else windows
    inference: str = legal("auto", "window", "whole", "aspect")
    # pixels of a view: a side, or height and width; empty: the training crop
    view_size: tuple[int, ...] = ()
    # windows: pixels that an image's short side is brought to; masks come back at the image's own size.
    # 0: scale 1 of the training crops, where they are scaled by it, else as the image comes
    short_side: int = 0
    # what a class counts that the labels never show; auto: by the rule of the data set
    absent_rule: str = legal("auto", "mmseg", "detectron2", "official")
    # up to how many classes all of them are asked for. Beyond, a coarse pass says which are there: how
    # many it lets through (16 to 32 of hundreds), and from which presence score on (ours)
    exhaustive_limit: int = 200
    gate_limit: int = 16
    gate_cut: float = 0.3
    batch_size: int = 4  # views per compiled call, over all devices
    num_images: int = 0  # 0: the whole split
    gallery: int = 24  # images shown in the report
    calibrate: bool = True  # fit the probability's scale and each query's bias on calibrate_split
    calibrate_split: str = legal("val", "train")  # train: where a data set has no third split
    calibrate_images: int = 0  # of that split; 0: num_images
    estep: tuple[str, ...] = ()  # rows of the E-Step table, such as "4x2" or "4x2:leading"


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = -1  # -1: all remaining devices
    # devices that share one state. 0: chosen from the chip and how many there are (mesh_choice.py)
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class CompileConfig:
    """What --mode=compile compiles."""

    program: str = legal("train", "eval")  # the train step, or one batch of the evaluation
    unet_only: bool = False  # train: the U-Net's step on given latents and tokens, nothing else
    per_device_batch: int = 0  # images a device; 0: what train.batch_size or eval.batch_size gives
    eval_queries: int = 0  # eval: classes of the vocabulary; 0: those of config.data
    # exec_time_optimization_effort, from -1 to 1. A run is compiled with 0. -1 is for a quick look: its
    # memory is a tenth too low, and it knows no fetching ahead (aot/RECORD.md)
    effort: float = 0.0
    # TPUs: also search for the fastest tiling of every convolution, as a run does. That is most
    # of its compilation, and changes no number of the report but compile_seconds
    tuned: bool = False
    advice: bool = True  # over budget: trace the step with other settings, to say what would fit


@dataclasses.dataclass(frozen=True)
class Config:
    task: str = legal("segmentation", "prior", "autoencoder")
    seed: int = 0
    init_from: str = ""  # another run's working directory: start from its newest checkpoint's weights
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    segmentation: SegmentationConfig = SegmentationConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()
    compile: CompileConfig = CompileConfig()
