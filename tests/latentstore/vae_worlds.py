"""Small autoencoders of diffusers' architectures, with seeded weights, saved as checkpoints are."""

from __future__ import annotations

import numpy as np
from store_worlds import SIZE, picture

from latentstore.encoders import load_encoder

_KL = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 8, 8, 8),
    "norm_num_groups": 4,
    "latent_channels": 4,
    "layers_per_block": 1,
}
SETTINGS = {
    "AutoencoderKL": _KL,
    "AutoencoderTiny": {
        "encoder_block_out_channels": (8, 8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8, 8),
        "num_encoder_blocks": (1, 1, 1, 1),
        "num_decoder_blocks": (1, 1, 1, 1),
    },
    # MoVQ normalises its decoder by the quantised latent ("spatial"), in 32 groups.
    "VQModel": _KL
    | {"block_out_channels": (32,) * 4, "num_vq_embeddings": 16, "vq_embed_dim": 4, "norm_type": "spatial"},
    "AsymmetricAutoencoderKL": {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "down_block_out_channels": (8, 8, 8, 8),
        "up_block_out_channels": (32, 32, 32, 32),
        "norm_num_groups": 4,
    },
    "ConsistencyDecoderVAE": {
        "encoder_block_out_channels": (8, 8, 8, 8),
        "encoder_layers_per_block": 1,
        "encoder_norm_num_groups": 4,
        "decoder_block_out_channels": (8, 8),
        "decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 2,
        "decoder_layers_per_block": 1,
        "decoder_norm_num_groups": 4,
    },
    "AutoencoderDC": {
        "latent_channels": 8,
        "attention_head_dim": 4,
        "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
        "encoder_block_out_channels": (8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8),
        "encoder_layers_per_block": (1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1),
        "encoder_qkv_multiscales": ((), (), (5,)),
        "decoder_qkv_multiscales": ((), (), (5,)),
    },
}


def build(kind, seed=0, **options):
    import diffusers
    import torch

    torch.manual_seed(seed)
    return getattr(diffusers, kind)(**SETTINGS[kind] | options).eval()


def save(folder, kind, **options):
    build(kind, **options).save_pretrained(folder, safe_serialization=True)
    return folder


def load(folder, **options):
    return load_encoder(str(folder), **{"image_size": SIZE, "device": "cpu"} | options)


def reload(folder, kind):
    """The whole model as diffusers itself loads it."""
    import diffusers

    return getattr(diffusers, kind).from_pretrained(folder, use_safetensors=True).eval()


def pictures(n, size=SIZE, seed=0):
    return np.stack([np.asarray(picture(seed + i, size, size)) for i in range(n)])


def unit(x, dtype=None):
    """(b, 3, size, size) in [-1, 1]: the paper's ToTensor and Normalize([0.5], [0.5])."""
    import torch

    return torch.from_numpy((x.astype(np.float32) / 255 - 0.5) / 0.5).permute(0, 3, 1, 2).to(dtype)
