"""Recipes for shapes: coloured shapes with captions, 32×32, drawn by `training.shapes`; nothing to download."""

from __future__ import annotations

import models.dalle
from training.config import AdamW, Run


def dalle() -> Run:
    """Text to image: 64 patches of two codes, a transformer of four layers over captions and codes: 35 CPU minutes of
    one thread."""
    return Run(
        family="dalle",
        config=models.dalle.Config(),
        data="shapes",
        steps=13_000,
        restarts=(5_200,),  # where the transformer's stage begins
        batch_size=64,
        optimisers={"autoencoder": AdamW(lr=2e-3), "transformer": AdamW(lr=4e-3, weight_decay=0.05)},
        channels_last=True,
        storage="fp16",
    )
