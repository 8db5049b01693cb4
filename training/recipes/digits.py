"""Recipes for scikit-learn's digits (8×8 grey, ten classes): seconds to minutes on a laptop, nothing to download."""

from __future__ import annotations

import models.consistency
import models.ddpm
import models.gan
import models.pixelcnn
import models.realnvp
import models.vae
from training.config import AdamW, Run


def ddpm() -> Run:
    """Class-conditional DDPM on two resolutions: two minutes.

    Reached on the 300 test images a bound of 2.29 bits/dim without labels, 0.08 above the training images'; a
    classifier sees the asked class in all of 490 samples (50 DDIM steps, guidance 1.5).
    """
    return Run(
        family="ddpm",
        config=models.ddpm.Config(multipliers=(1, 2)),
        data="digits",
        steps=4_000,
        batch_size=64,
        optimisers={"network": AdamW(lr=2e-3)},
        channels_last=True,
    )


def consistency() -> Run:
    """Consistency training from scratch, without a teacher: samples in one step. Five minutes."""
    return Run(
        family="consistency",
        config=models.consistency.Config(multipliers=(1, 2), intervals=(10, 160), noise_mean=0.0),
        data="digits",
        steps=8_000,
        batch_size=64,
        optimisers={"network": AdamW(lr=1e-3)},
        channels_last=True,
    )


def vae() -> Run:
    """Class-conditional VAE, categorical pixels (the digits use 17 of the 256 levels): a minute.

    Reached on the 300 test images a bound of 2.06 bits/dim without labels (S=64), 0.11 above the training images'.
    """
    return Run(
        family="vae",
        config=models.vae.Config(
            latent=16, width=32, blocks=1, hidden=128, prior_components=8, likelihood="categorical"
        ),
        data="digits",
        steps=2_000,
        batch_size=64,
        optimisers={"vae": AdamW(lr=2e-3, weight_decay=0.05)},
        channels_last=True,
    )


def realnvp() -> Run:
    """RealNVP with learnt channel mixing, eight couplings on two scales: half a minute.

    Reached 4.28 bits/dim on the 300 test images, 0.08 above the training images'. Larger or longer, it learns by heart.
    """
    return Run(
        family="realnvp",
        config=models.realnvp.Config(couplings=(4, 4), widths=(32, 32)),
        data="digits",
        steps=1_000,
        batch_size=64,
        optimisers={"flow": AdamW(lr=2e-3)},
        ema=0.99,
    )


def gan() -> Run:
    """Class-conditional GAN on two resolutions, hinge loss with lazy R1: two minutes."""
    return Run(
        family="gan",
        config=models.gan.Config(
            latent=32, generator_channels=(32, 64), critic_channels=(32, 64), blocks=(0, 1), penalty=0.3
        ),
        data="digits",
        steps=4_000,
        batch_size=64,
        optimisers={"critic": AdamW(lr=1e-3, betas=(0.0, 0.99)), "generator": AdamW(lr=1e-3, betas=(0.0, 0.99))},
        clip=None,
        channels_last=True,
    )


def pixelcnn() -> Run:
    """Class-conditional gated PixelCNN, four layers: ten seconds. Later it would learn its thousand images by heart."""
    return Run(
        family="pixelcnn",
        config=models.pixelcnn.Config(features=32, dilations=(1, 2, 1, 2), hidden=64, embedding=16),
        data="digits",
        steps=500,
        batch_size=32,
        optimisers={"pixelcnn": AdamW(lr=4e-3, weight_decay=0.5)},
        ema=0.98,
    )
