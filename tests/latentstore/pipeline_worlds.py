"""Small text-guided pipelines of diffusers' classes, with seeded random weights, saved as checkpoints are."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

WORDS = ("cat", "dog", "tree", "house", "sea")
TEXT_LENGTH = 8
SIZE = 64
"""Side in pixels that a pipeline was made for: 8 × 8 latents at a factor of 8, 4 × 4 at 16."""


def save_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer that knows a few words; others are spelt letter by letter."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    merges: list[str] = []
    pieces = [*letters, *(f"{letter}</w>" for letter in letters)]
    for word in WORDS:
        piece = word[0]
        for i, letter in enumerate(word[1:], 2):
            end = "</w>" if i == len(word) else ""
            merges.append(f"{piece} {letter}{end}")
            piece += letter + end
            pieces.append(piece)
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merged = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    merged.write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]) + "\n")
    return CLIPTokenizer(str(vocabulary), str(merged), model_max_length=TEXT_LENGTH)


def save_pipeline(folder: Path, seed: int = 0, *, levels: int = 4, scheduler: str = "DDIMScheduler") -> Path:
    """Save a StableDiffusionPipeline of some 70,000 weights, its VAE at 1/2^(levels-1) of the size."""
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    words = save_tokenizer(folder.parent / f"{folder.name}-words")
    channels = 4 if levels == 4 else 16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8,) * levels,
            decoder_block_out_channels=(8,) * levels,
            num_encoder_blocks=(1,) * levels,
            num_decoder_blocks=(1,) * levels,
            latent_channels=channels,
        )
        unet = diffusers.UNet2DConditionModel(
            sample_size=SIZE >> (levels - 1),
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=4,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=TEXT_LENGTH,
                bos_token_id=words.bos_token_id,
                eos_token_id=words.eos_token_id,
                pad_token_id=words.pad_token_id,
            )
        )
        # Random weights make small latents and nearly black pictures; of these a picture is seen to be made.
        with torch.no_grad():
            vae.encoder.layers[-1].weight *= 100
            vae.decoder.layers[-1].weight *= 8
            vae.decoder.layers[-1].bias += 0.5
    kind = getattr(diffusers, scheduler)
    # What diffusers would set otherwise, with a warning.
    usual = {"steps_offset": 1, "clip_sample": False}
    known = inspect.signature(kind.__init__).parameters
    diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=words,
        unet=unet,
        scheduler=kind(**{name: value for name, value in usual.items() if name in known}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)
    return folder
