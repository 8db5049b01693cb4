"""Recipes for shapes: coloured shapes with captions, 32×32, drawn by `training.shapes`; nothing to download."""

from __future__ import annotations

import models.dalle
import models.ddpm
import models.gan
import models.pixelcnn
from training.config import AdamW, Run


def dalle() -> Run:
    """Text to image: 64 patches of two codes, a transformer of four layers over captions and codes: 35 CPU minutes of
    one thread.

    Of 1,000 samples for held-out captions 74 % have arrangement, counts, colours and shapes all right, as a network
    reads them that was trained on the drawn pictures: counts 83 %, shapes 91 %, colours 97 %.
    """
    return Run(
        family="dalle",
        config=models.dalle.Config(),
        data="shapes",
        steps=22_500,
        restarts=(9_000,),  # where the transformer's stage begins
        batch_size=32,
        optimisers={"autoencoder": AdamW(lr=4e-3), "transformer": AdamW(lr=4e-3, weight_decay=0.05)},
        channels_last=True,
        storage="fp16",
    )


def text_gan() -> Run:
    """Text to image in one pass: a style generator that looks at the caption's words, taught first by drawing pictures
    anew from their layouts, while the critic learns to match pictures and captions, then by that critic too (hinge,
    lazy R1).

    Of 1,000 samples for held-out captions 68 % have arrangement, counts, colours and shapes all right, as a network
    reads them that was trained on the drawn pictures: arrangements 95 %, counts 88 %, shapes 78 %, colours 99 %. 115
    CPU minutes of one thread.
    """
    return Run(
        family="gan",
        config=models.gan.Config(
            generator="style",
            latent=96,
            generator_channels=(32, 64, 96, 96),
            critic_channels=(16, 32, 64, 96),
            blocks=(0, 0, 1, 0),
            penalty=0.05,
            caption_length=12,
            text_layers=3,
            features=256,
            reconstruction=10.0,
            critic_from=1 / 3,
        ),
        data="shapes",
        steps=12_000,
        restarts=(4_000,),  # where the critic comes
        batch_size=64,
        optimisers={"critic": AdamW(lr=1e-3, betas=(0.5, 0.99)), "generator": AdamW(lr=1e-3, betas=(0.5, 0.99))},
        clip=None,
        storage="fp16",
        channels_last=True,
    )


def pixelcnn() -> Run:
    """Gated PixelCNN in colour, nine dilated layers, blind to captions, to find faults with: 16 CPU minutes of one
    thread.

    Reached 0.233 bits/dim on the 5,000 test images. Heat maps find faults of colour and texture and scratches, less
    surely those of shape (docs/anomalies.md). Samples have the colours of the pictures and no shapes, so that it is no
    model to draw with.
    """
    return Run(
        family="pixelcnn",
        config=models.pixelcnn.Config(features=32, hidden=48, embedding=16),
        data="shapes",
        steps=2_500,
        batch_size=16,
        optimisers={"pixelcnn": AdamW(lr=6e-3)},
        channels_last=True,
        storage="fp16",
    )


def ddpm() -> Run:
    """DDPM in colour, blind to captions, v-prediction, cosine schedule, learned variance, to find faults with: 46
    minutes of one thread, beside other work.

    Its heat maps find faults of all kinds, those of shape too (docs/anomalies.md). Samples have crisp colours and
    places, and rough shapes.
    """
    return Run(
        family="ddpm",
        config=models.ddpm.Config(),
        data="shapes",
        steps=5_000,
        batch_size=48,
        optimisers={"network": AdamW(lr=2e-3)},
        channels_last=True,
        storage="fp16",
    )
