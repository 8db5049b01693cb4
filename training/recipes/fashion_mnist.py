"""Recipes for Fashion-MNIST (28×28 grey, ten classes): what the zoo ships."""

from __future__ import annotations

import models.bayesnet
import models.boltzmann
import models.consistency
import models.ddpm
import models.ebm
import models.flow_matching
import models.gan
import models.gaussian
import models.glow
import models.latent_diffusion
import models.nice
import models.pixel_transformer
import models.pixelcnn
import models.realnvp
import models.score_sde
import models.vae
import models.vqvae
from training.config import AdamW, Run


def ddpm() -> Run:
    """Class-conditional DDPM, v-prediction, cosine schedule, learned variance: 35 CPU minutes of one thread.

    Reached: at most 2.835 ± 0.008 bits/dim (all 10,000 test images, no labels); at 50 DDIM steps and guidance 1.5 a
    classifier that is right on 92.5 % of the test images sees the asked class in 96.5 % of 1,000 samples.
    """
    return Run(
        family="ddpm",
        config=models.ddpm.Config(),
        data="fashion-mnist",
        steps=11_000,
        batch_size=64,
        optimisers={"network": AdamW(lr=2e-3)},
        channels_last=True,
    )


def consistency() -> Run:
    """Consistency model distilled from the zoo's DDPM under guidance 1.5: samples in one step. 27 CPU minutes of one
    thread.

    Of 1,000 samples drawn in one step 96 % were classified as the class asked for, by a network that is right about
    92 % of the test images. FD-local 31 in one step, 20 in two, 15 in four (its teacher in 50 steps: 9).
    """
    return Run(
        family="consistency",
        config=models.consistency.Config(intervals=(10, 40), noise_mean=0.0, weighting="output"),
        data="fashion-mnist",
        steps=2_300,
        batch_size=64,
        optimisers={"network": AdamW(lr=1e-3)},
        teacher="fashion-mnist-ddpm",
        ema=0.998,
        warmup=50,
        storage="fp16",
        channels_last=True,
        checkpoint_every=200,
    )


def latent_diffusion() -> Run:
    """Latent diffusion: 7×7 codes of eight channels, an autoencoder with a critic, then a U-Net of the codes: 25 CPU
    minutes of one thread.

    93 % of 1,000 samples were classified as the class asked for, by a network that is right about 92 % of the test
    images. FD-local 27; the autoencoder alone, which is its floor, has 7. Sandals are its weak class.
    """
    return Run(
        family="latent_diffusion",
        config=models.latent_diffusion.Config(channels=48, autoencoder_share=0.3),
        data="fashion-mnist",
        steps=15_000,
        restarts=(4_500,),
        batch_size=64,
        optimisers={
            "critic": AdamW(lr=3e-3, betas=(0.5, 0.99)),
            "autoencoder": AdamW(lr=1e-3, betas=(0.5, 0.99)),
            "diffusion": AdamW(lr=3e-3),
        },
        storage="fp16",
        channels_last=True,
    )


def vae() -> Run:
    """Class-conditional VAE, mixture of five logistics a pixel: 13 CPU minutes of one thread.

    Reached on the 10,000 test images a bound of 3.20 bits/dim without labels and 3.18 given them (S=64), and 85 % of
    1,000 samples classified as the class asked for, by a network that is right about 92 % of the test images.
    """
    return Run(
        family="vae",
        config=models.vae.Config(latent=64, width=64, blocks=2, hidden=256, prior_components=32, components=5),
        data="fashion-mnist",
        steps=13_000,
        batch_size=64,
        optimisers={"vae": AdamW(lr=2e-3, weight_decay=0.01)},
        storage="fp16",
        channels_last=True,
    )


def hierarchical_vae() -> Run:
    """Class-conditional VAE with ten groups of latents, from 1×1 to 14×14: 25 CPU minutes of one thread.

    Reached on the 10,000 test images a bound of 3.04 bits/dim without labels and 2.99 given them (S=16), and 88 % of
    1,000 samples classified as the class asked for, by a network that is right about 92 % of the test images. Sandals
    and bags come out torn now and then.
    """
    return Run(
        family="vae",
        config=models.vae.Config(
            width=64, blocks=2, groups=(4, 3, 2, 0, 1), group_channels=(4, 8, 16, 1, 32), importance_samples=16
        ),
        data="fashion-mnist",
        steps=10_000,
        batch_size=32,
        optimisers={"vae": AdamW(lr=2e-3, weight_decay=0.01)},
        storage="fp16",
        channels_last=True,
    )


def realnvp() -> Run:
    """RealNVP with learnt channel mixing, 20 couplings on two scales: 29 CPU minutes of one thread, 3.044 bits/dim."""
    return Run(
        family="realnvp",
        config=models.realnvp.Config(couplings=(8, 12), widths=(64, 128)),
        data="fashion-mnist",
        steps=13_000,
        batch_size=64,
        optimisers={"flow": AdamW(lr=2e-3)},
        storage="fp16",
    )


def nice() -> Run:
    """NICE behind a logit, four convolutional couplings and eight dense ones: 8 CPU minutes of one thread.

    Reached: 3.713 bits/dim on the 10,000 test images; of 1,000 samples FD-local 335, coverage 0.33.
    """
    return Run(
        family="nice",
        config=models.nice.Config(couplings=("convolutional",) * 4 + ("dense",) * 8, units=88, channels=32),
        data="fashion-mnist",
        steps=13_000,
        batch_size=64,
        optimisers={"flow": AdamW(lr=4e-3)},
        storage="fp16",
    )


def glow() -> Run:
    """Class-conditional Glow, 20 steps of flow on two scales, couplings told label and place: 37 CPU minutes of one
    thread.

    Reached on the 10,000 test images 3.068 bits/dim without labels and 3.000 given them. Of 1,000 samples a classifier
    (92.5 % right on the test images) sees the asked class in 93.5 %; FD-local 60, coverage 0.81.
    """
    return Run(
        family="glow",
        config=models.glow.Config(couplings=(8, 12), widths=(64, 128), maps=8),
        data="fashion-mnist",
        steps=10_000,
        batch_size=64,
        optimisers={"flow": AdamW(lr=2e-3)},
        storage="fp16",
    )


def gan() -> Run:
    """Class-conditional GAN, hinge loss with lazy R1, projection critic: 15 CPU minutes of one thread.

    A classifier (93.2 % on the real test set) agreed with the asked label on 951 of 1,000 samples at temperature 1, on
    988 at 0.7; within a class its features spread 0.94 times as far as those of real images.
    """
    return Run(
        family="gan",
        config=models.gan.Config(
            generator_channels=(16, 64, 96), critic_channels=(16, 64, 96), blocks=(0, 0, 1), penalty=0.3
        ),
        data="fashion-mnist",
        steps=7_000,
        batch_size=64,
        optimisers={"critic": AdamW(lr=1e-3, betas=(0.0, 0.99)), "generator": AdamW(lr=1e-3, betas=(0.0, 0.99))},
        clip=None,
        storage="fp16",
        channels_last=True,
    )


def style_gan() -> Run:
    """Class-conditional GAN with a style generator, hinge loss with lazy R1: about 30 CPU minutes of one thread.

    Reached a label agreement of 0.932, FD-local 6.0 and coverage 0.97.
    """
    return Run(
        family="gan",
        config=models.gan.Config(generator="style", generator_channels=(16, 48, 96)),
        data="fashion-mnist",
        steps=7_000,
        batch_size=64,
        optimisers={"critic": AdamW(lr=1e-3, betas=(0.0, 0.99)), "generator": AdamW(lr=1e-3, betas=(0.0, 0.99))},
        clip=None,
        storage="fp16",
        channels_last=True,
    )


def pixelcnn() -> Run:
    """Class-conditional gated PixelCNN, nine dilated layers: 40 CPU minutes of one thread.

    After 6,500 steps, when the learning rate came to zero for the first time: 2.793 bits/dim on the 10,000 test images,
    and a classifier agreed with the asked label on 0.798 of 1,000 samples.
    """
    return Run(
        family="pixelcnn",
        config=models.pixelcnn.Config(),
        data="fashion-mnist",
        steps=9_500,
        restarts=(6_500,),
        batch_size=16,
        optimisers={"pixelcnn": AdamW(lr=6e-3)},
        channels_last=True,
        storage="fp16",
    )


def pixel_transformer() -> Run:
    """Class-conditional pixel transformer, five layers that look near and up: 50 CPU minutes of one thread.

    Reached on the 10,000 test images 2.78 bits/dim without labels and 2.76 given them. 71 % of 1,000 samples were
    classified as the class asked for, by a network that is right about 92 % of the test images: texture comes first.
    """
    return Run(
        family="pixel_transformer",
        config=models.pixel_transformer.Config(),
        data="fashion-mnist",
        steps=15_000,
        batch_size=4,
        optimisers={"transformer": AdamW(lr=3e-3)},
        storage="fp16",
    )


def score_sde() -> Run:
    """Class-conditional score model of the variance-preserving SDE: 30 CPU minutes of one thread.

    Reached a label agreement of 0.955 and FD-local 14 in 16 Heun steps with guidance 1.5, and 2.92 ± 0.07 bits/dim by
    the probability-flow ODE on 128 test images.
    """
    return Run(
        family="score_sde",
        config=models.score_sde.Config(),
        data="fashion-mnist",
        steps=7_000,
        batch_size=64,
        optimisers={"network": AdamW(lr=2e-3)},
        storage="fp16",
        channels_last=True,
    )


def flow_matching() -> Run:
    """Class-conditional flow matching along the optimal-transport path: 35 CPU minutes of one thread.

    96 % of 1,000 samples were classified as the class asked for, by a network that is right about 92 % of the test
    images; FD-local 8. On 170 test images 2.94 ± 0.06 bits/dim without labels and 2.92 given them, where half of the
    solver's steps give 2.93 and 99 % of the images have converged.
    """
    return Run(
        family="flow_matching",
        config=models.flow_matching.Config(),
        data="fashion-mnist",
        steps=6_500,
        batch_size=64,
        optimisers={"network": AdamW(lr=2e-3)},
        storage="fp16",
        channels_last=True,
    )


def gaussian() -> Run:
    """One Gaussian with a full covariance, the closed form of maximum likelihood: 5 CPU seconds of one thread.

    Reached 6.462 bits/dim on the 10,000 test images. The samples are ghosts.
    """
    return Run(
        family="gaussian",
        config=models.gaussian.Config(),
        data="fashion-mnist",
        steps=0,
        batch_size=500,
        storage="fp16",
        precision="fp32",
        warmup=0,
    )


def gaussian_mixture() -> Run:
    """Eighteen Gaussians for each class, two shared factors and noise of each pixel's own: 76 seconds of EM.

    Reached on the 10,000 test images 4.590 bits/dim without labels and 4.589 given them; a classifier agreed with the
    asked label on 0.794 of 1,000 samples.
    """
    return Run(
        family="gaussian",
        config=models.gaussian.Config(components=18, rank=2, by_class=True, iterations=60),
        data="fashion-mnist",
        steps=0,
        batch_size=500,
        storage="fp16",
        precision="fp32",
        warmup=0,
    )


def bayesnet() -> Run:
    """Chow–Liu tree over pixels, with the class as a further parent of each, in six bins of grey, for which its tables
    take 0.4 MB less than for eight: 22 seconds of counting, one thread.

    Reached on the 10,000 test images 3.622 bits/dim without labels and 3.629 given them (eight bins: 3.553 and 3.562);
    its p(y | x) is right about 0.811 of them. A classifier agreed with the asked label on 0.740 of 1,000 samples.
    """
    return Run(
        family="bayesnet",
        config=models.bayesnet.Config(by_class=True, bins=6),
        data="fashion-mnist",
        steps=0,
        batch_size=500,
        storage="fp16",
        precision="fp32",
        warmup=0,
    )


def naive_bayes() -> Run:
    """Naive Bayes: pixels that depend on the class alone, in 16 bins of grey: 3 seconds of counting, one thread.

    Reached on the 10,000 test images 4.171 bits/dim without labels and 4.223 given them; its p(y | x) is right about
    0.739 of them. A classifier agreed with the asked label on 0.641 of 1,000 samples.
    """
    return Run(
        family="bayesnet",
        config=models.bayesnet.Config(by_class=True, tree=False, bins=16),
        data="fashion-mnist",
        steps=0,
        batch_size=500,
        storage="fp16",
        precision="fp32",
        warmup=0,
    )


def rbm() -> Run:
    """Class-conditional RBM of 320 hidden units, persistent chains: 8 CPU minutes of one thread.

    Reached 3.890 ± 0.011 bits/dim on the 10,000 test images without labels; annealing forwards and backwards found
    log Z within 0.017 bits/dim of each other. A classifier that is right on 92.5 % of the test images sees the asked
    class in 79 % of 1,000 samples after 100 sweeps: garments are plain to see, and soft.
    """
    return Run(
        family="boltzmann",
        config=models.boltzmann.Config(hidden=(320,)),
        data="fashion-mnist",
        steps=12_000,
        batch_size=100,
        optimisers={"machine": AdamW(lr=1e-3)},
        clip=None,
        precision="fp32",
        storage="fp16",
    )


def dbm() -> Run:
    """Class-conditional DBM of 300 and 150 hidden units, greedy start: 12 CPU minutes of one thread.

    Reached on the 10,000 test images an estimated 3.94 bits/dim; 73 % of 1,000 samples were classified as the class
    asked for, by a network that is right about 92 % of the test images. Garments are plain to see and blurred.
    """
    return Run(
        family="boltzmann",
        config=models.boltzmann.Config(hidden=(300, 150)),
        data="fashion-mnist",
        steps=14_000,
        batch_size=100,
        optimisers={"machine": AdamW(lr=1e-3)},
        clip=None,
        precision="fp32",
        storage="fp16",
    )


def vqvae() -> Run:
    """Class-conditional VQ-VAE, 49 patches of two codes, a transformer of four layers: 20 CPU minutes of one thread.

    Reached on the 10,000 test images a bound of 3.43 bits/dim, by the encoder's codes alone; 81 % of 1,000 samples were
    classified as the class asked for, by a network that is right about 92 % of the test images. FD-local 17, of
    reconstructions 5.
    """
    return Run(
        family="vqvae",
        config=models.vqvae.Config(groups=2, codes=256, dims=8),
        data="fashion-mnist",
        steps=20_000,
        restarts=(8_000,),  # where the prior's stage begins
        batch_size=32,
        optimisers={"autoencoder": AdamW(lr=4e-3), "prior": AdamW(lr=4e-3, weight_decay=0.05)},
        channels_last=True,
        storage="fp16",
    )


def ebm() -> Run:
    """Class-conditional energy-based model, replayed Langevin chains from a Gaussian: 22 CPU minutes of one thread.

    Reached a label agreement of 0.978, FD-local 23 and coverage 0.91 in 60 Langevin steps.
    """
    return Run(
        family="ebm",
        config=models.ebm.Config(langevin_steps=15, restart=0.2, replay=2000, default_steps=60),
        data="fashion-mnist",
        steps=4_600,
        batch_size=64,
        optimisers={"energy": AdamW(lr=1e-3, betas=(0.0, 0.99))},
        channels_last=True,
        storage="fp16",
    )
