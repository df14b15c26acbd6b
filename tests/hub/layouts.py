# SPDX-License-Identifier: Apache-2.0
"""The repositories' JSON files: the real keys and values, but for widths and numbers of layers.

Beyond those, structure is the real one: classes, four levels, places of attention, numbers of heads in
Stable Diffusion 1.5 and their growth with the level in 2.x, token counts, activations.
"""

from __future__ import annotations

from typing import Any

Values = dict[str, Any]

TEXT_WIDTH = 32  # of CLIP ViT-L/14 and ViT-H/14 here; 768 and 1024 in the real ones
B16_TEXT_WIDTH = 16  # 512
BERT_WIDTH = 64  # 768
_UNET_WIDTHS = [16, 32, 32, 32]  # 320, 640, 1280, 1280
_VAE_WIDTHS = [8, 8, 16, 16]  # 128, 256, 512, 512

_UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": _UNET_WIDTHS,
    "center_input_sample": False,
    "cross_attention_dim": TEXT_WIDTH,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 8,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
_UNET_SD2 = _UNET | {
    "_diffusers_version": "0.10.0.dev0",
    "attention_head_dim": [2, 4, 4, 4],  # heads of one width: 5, 10, 20, 20 of 64 channels
    "dual_cross_attention": False,
    "only_cross_attention": False,
    "num_class_embeds": None,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
_UNET_MARIGOLD = _UNET_SD2 | {
    "_diffusers_version": "0.32.0",
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": None,
    "attention_type": "default",
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "dropout": 0.0,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "in_channels": 8,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
}
_VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": _VAE_WIDTHS,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_VAE_MARIGOLD = _VAE | {
    "_diffusers_version": "0.32.0",
    "force_upcast": True,
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "sample_size": 768,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
_CLIP_TEXT = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,  # as configs said for years: the largest id ends the text
    "hidden_act": "quick_gelu",
    "hidden_size": TEXT_WIDTH,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 4 * TEXT_WIDTH,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 1,
    "projection_dim": TEXT_WIDTH,
    "torch_dtype": "float32",
    "vocab_size": 49408,
}
# what Stable Diffusion 2.x has of OpenCLIP's tower: one layer fewer than it was trained with
_CLIP_TEXT_H14 = _CLIP_TEXT | {
    "hidden_act": "gelu",
    "num_hidden_layers": 3,
    "projection_dim": TEXT_WIDTH // 2,
}
_BETAS = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
_PNDM = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0"} | _BETAS
_DDIM = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.8.0",
    "prediction_type": "v_prediction",
} | _BETAS
_DDIM_MARIGOLD = _DDIM | {
    "_diffusers_version": "0.32.0",
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "rescale_betas_zero_snr": True,
    "sample_max_value": 1.0,
    "thresholding": False,
    "timestep_spacing": "trailing",
}
_PARTS = {
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
_SAFETY = {
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
}
_DDIM_PART = {"scheduler": ["diffusers", "DDIMScheduler"]}

SD15 = {
    "model_index.json": {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.6.0"}
    | _SAFETY
    | _PARTS,
    "scheduler": _PNDM,
    "text_encoder": _CLIP_TEXT,
    "unet": _UNET,
    "vae": _VAE,
}
SD21 = {
    "model_index.json": {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.8.0",
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
    }
    | _PARTS
    | _DDIM_PART,
    "scheduler": _DDIM,
    "text_encoder": _CLIP_TEXT_H14,
    "unet": _UNET_SD2,
    "vae": _VAE | {"_diffusers_version": "0.8.0", "sample_size": 768},
}
SD21_BASE = SD21 | {
    "model_index.json": SD21["model_index.json"] | {"scheduler": _PARTS["scheduler"]},
    "scheduler": _PNDM,
    "unet": _UNET_SD2 | {"sample_size": 64},
    "vae": _VAE | {"_diffusers_version": "0.8.0"},
}
MARIGOLD = {
    "model_index.json": {
        "_class_name": "MarigoldDepthPipeline",
        "_diffusers_version": "0.32.0",
        "default_denoising_steps": 4,
        "default_processing_resolution": 768,
        "prediction_type": "depth",
        "scale_invariant": True,
        "shift_invariant": True,
    }
    | _PARTS
    | _DDIM_PART,
    "scheduler": _DDIM_MARIGOLD,
    "text_encoder": _CLIP_TEXT_H14,
    "unet": _UNET_MARIGOLD,
    "vae": _VAE_MARIGOLD,
}
PREPROCESSOR = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}


def clip(text_width: int, patch_size: int) -> Values:
    """config.json of a whole CLIPModel, as OpenAI's repositories have it."""
    own = {
        "hidden_size": text_width,
        "intermediate_size": 4 * text_width,
        "num_attention_heads": text_width // 8,
        "num_hidden_layers": 2,
        "projection_dim": text_width,
    }
    vision = own | {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 4}
    vision["patch_size"] = patch_size
    text_model = {k: v for k, v in _CLIP_TEXT.items() if k not in ("architectures", "torch_dtype")}
    vision_model = {
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "hidden_act": "quick_gelu",
        "image_size": 224,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model",
    }
    return {
        "architectures": ["CLIPModel"],
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": text_width,
        "text_config": text_model | own,
        "text_config_dict": own,
        "torch_dtype": "float32",
        "transformers_version": None,
        "vision_config": vision_model | vision,
        "vision_config_dict": vision,
    }


BIOMEDCLIP = {
    "model_cfg": {
        "embed_dim": 32,  # 512
        "vision_cfg": {
            "timm_model_name": "vit_base_patch16_224",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 224,
        },
        "text_cfg": {
            "hf_model_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
            "hf_tokenizer_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
            "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "context_length": 256,
            "heads": 1,  # not in the real file: of a BERT 768 wide they are known
        },
    },
    "preprocess_cfg": {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
    },
}
TAESD = {
    "_class_name": "AutoencoderTiny",
    "_diffusers_version": "0.20.0.dev0",
    "act_fn": "relu",
    "block_out_channels": [64, 64, 64, 64],
    "decoder_block_out_channels": [8, 8, 8, 8],  # 64
    "encoder_block_out_channels": [8, 8, 8, 8],  # 64
    "force_upcast": False,
    "in_channels": 3,
    "latent_channels": 4,
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "num_decoder_blocks": [3, 3, 3, 1],
    "num_encoder_blocks": [1, 3, 3, 3],
    "out_channels": 3,
    "scaling_factor": 1.0,
    "upsampling_scaling_factor": 2,
}
