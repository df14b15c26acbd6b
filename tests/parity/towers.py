# SPDX-License-Identifier: Apache-2.0
"""Small towers and their inputs, shared by the parity tests and the scripts in tests/golden."""

from __future__ import annotations

import importlib
import sys
import types
from importlib import metadata
from typing import Any

import numpy as np
from oracle import seeded_input

END = 58  # end of text in the small CLIP vocabulary
_TEXT = {
    "model_type": "clip_text_model",
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 40,
    "projection_dim": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
    "hidden_act": "quick_gelu",
    "bos_token_id": 57,
    "eos_token_id": END,
    "pad_token_id": 0,
}
VISION = {
    "architectures": ["CLIPVisionModelWithProjection"],
    "model_type": "clip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 40,
    "projection_dim": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "hidden_act": "quick_gelu",
}
CLIP = {
    # OpenAI's; end of text 2 stands for "the largest id", as configs said for years
    "text_quick": _TEXT | {"architectures": ["CLIPTextModel"], "eos_token_id": 2},
    # OpenCLIP's
    "text_gelu": _TEXT | {"architectures": ["CLIPTextModel"], "hidden_act": "gelu"},
    "text_projected": _TEXT | {"architectures": ["CLIPTextModelWithProjection"]},
    "vision": VISION,
}
BERT = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
}
# open_clip's own file, with the heads of the BERT behind it, which is 128 wide
OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 16,
        "text_cfg": {
            "hf_model_name": "bert-base-uncased",
            "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "context_length": 16,
            "heads": 2,
        },
    }
}
OPEN_CLIP_BERT = BERT | {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}


def clip_ids(padding: int = END) -> tuple[np.ndarray, np.ndarray]:
    """Ids [3, 9] whose texts end at 8, 4 and 1, padded; and their mask."""
    ids = (np.abs(seeded_input("clip ids", (3, 9))) * 20).astype(np.int64) % 57
    ends = np.array([[8], [4], [1]])
    positions = np.arange(9)[None]
    ids = np.where(positions == ends, END, np.where(positions > ends, padding, ids))
    return ids, positions <= ends


def bert_ids() -> tuple[np.ndarray, np.ndarray]:
    """Ids [3, 9] with texts of 9, 4 and 1 tokens, padded with 0; and their mask."""
    mask = np.arange(9)[None] < np.array([[9], [4], [1]])
    ids = 1 + (np.abs(seeded_input("bert ids", (3, 9))) * 20).astype(np.int64) % 59
    return np.where(mask, ids, 0), mask


def pixels() -> np.ndarray:
    """Pixel values [2, 3, 16, 16]."""
    return seeded_input("pixels", (2, 3, 16, 16))


def torch_model(config: dict[str, Any]) -> Any:
    """The torch model of a hub config, with its random weights."""
    import transformers

    model_class = getattr(transformers, config["architectures"][0])
    return model_class(model_class.config_class.from_dict(config))


def torch_open_clip() -> Any:
    """open_clip's HFTextEncoder, without the rest of a package that wants torchvision and timm."""
    import transformers

    if "open_clip" not in sys.modules:
        package = types.ModuleType("open_clip")
        root = metadata.distribution("open_clip_torch").locate_file("open_clip")
        package.__path__ = [str(root)]
        sys.modules["open_clip"] = package
    text = OPEN_CLIP["model_cfg"]["text_cfg"]
    return importlib.import_module("open_clip.hf_model").HFTextEncoder(
        text["hf_model_name"],
        output_dim=OPEN_CLIP["model_cfg"]["embed_dim"],
        config=transformers.BertConfig.from_dict(OPEN_CLIP_BERT),
        pooler_type=text["hf_pooler_type"],
        proj_type=text["hf_proj_type"],
        pretrained=False,
    )


def torch_outputs(name: str, model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Token features and the pooled vector of a torch tower on the shared inputs."""
    import torch

    with torch.no_grad():
        if name == "vision":
            out = model(torch.from_numpy(pixels()))
            return out.last_hidden_state.numpy(), out.image_embeds.numpy()
        if name == "open_clip":
            ids, mask = bert_ids()
            hidden = model.transformer(
                torch.from_numpy(ids), attention_mask=torch.from_numpy(mask.astype(np.int64))
            )
            return hidden.last_hidden_state.numpy(), model(torch.from_numpy(ids)).numpy()
        ids, mask = clip_ids()
        out = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask.astype(np.int64)))
        pooled = out.text_embeds if name == "text_projected" else out.pooler_output
        return out.last_hidden_state.numpy(), pooled.numpy()
