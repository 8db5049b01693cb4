"""What a denoiser tells of an image beside its likelihood: how well it finds the image again under fixed amounts of
noise.

At low noise that shows the texture of an image, at high noise its shape and which way up it is: the denoiser then knows
little but where things are, and restores what it has learnt (Graham et al., arXiv 2211.07740). A *probe* is one
evaluation at a noise σ, on the scale where the image has −1 … 1, for every family that is a `Denoiser`:

    under noise     x̂₀(x₀ + σ ε): the error of the reconstruction. ε is a function of the image's bytes
    without         x̂₀(x₀): the image itself is taken for one with noise σ. (x̂₀ − x₀) / σ² is the score of the noisy
                    density there (arXiv 2010.13132)
    by label        under noise, with the ε of the probe without a label, for each label in turn

Statistics, where e is the mean squared error of x̂₀ and D the dimensions of an image:

    log_denoising_error_σ         log e under noise σ; _top_left, … of a quadrant alone
    log_score_norm_σ              log ‖score‖ of the image at σ, without noise
    label_marginal                nats, −log of the mean over labels of e^−D e / 2σ² at σ = LABEL_SIGMA
    label_gain                    nats, by how much D e / 2σ² is less for the best label than for the label asked for,
                                  which is none as a rule
    label_spread                  nats, standard deviation of D e / 2σ² over the labels

The last three need labels, MOST_LABELS at most. An image that no label explains any better than none, or all of them
equally, is of no class.

And a feature vector, since a network knows more of an image than how well it restores it:

    middle                        under noise FEATURE_SIGMA, what the coarsest level of the network ends with, in means
                                  over PLACES × PLACES parts of the image
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from models import _random
from models._diffusion import column

SIGMAS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of probes under noise
CLEAN_SIGMAS = (0.5, 1.0, 2.0)  # of those without
LABEL_SIGMA = 1.0  # one of SIGMAS
MOST_LABELS = 16  # each costs an evaluation
MAP_SIGMAS = (0.5, 1.0, 2.0)  # of a heat map
QUADRANTS = ("top_left", "top_right", "bottom_left", "bottom_right")
FEATURE_SIGMA = 0.5  # one of SIGMAS: texture is hidden, shape is not yet
PLACES = 3
LEAST_ERROR = 1e-8  # what is restored better counts as this
MAP_DRAW = 9  # draw of a heat map's noise

Denoised = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # as `Denoiser.denoised`
Probed = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # (x, sigma, labels) -> x̂₀, middle (B, K, H', W')


class Asked(NamedTuple):
    """One probe of each row."""

    sigma: Tensor  # (B,)
    noise: Tensor  # (B,) what ε is multiplied by: σ or 0
    which: Tensor  # (B,) int64, tells the ε of the probes apart
    label: Tensor  # (B,)


class Probes:
    """The probes of images with so many classes, in order. `count` evaluations of the network in all."""

    def __init__(self, classes: int) -> None:
        self.labels = classes if classes <= MOST_LABELS else 0
        self._sigma = (*SIGMAS, *CLEAN_SIGMAS, *(LABEL_SIGMA,) * self.labels)
        self._noisy = (*(True,) * len(SIGMAS), *(False,) * len(CLEAN_SIGMAS), *(True,) * self.labels)
        self._label = (*(-1,) * (len(SIGMAS) + len(CLEAN_SIGMAS)), *range(self.labels))  # -1: the one asked for
        self.count = len(self._sigma)

    def begin(self, x: Tensor) -> Tensor:
        """(B, count, 4) errors by quadrant, before anything is known."""
        return x.new_zeros(len(x), self.count, len(QUADRANTS))

    def at(self, index: Tensor, label: Tensor) -> Asked:
        """The probes index (B,), clamped to 0 … count − 1, of images whose score is asked for given label (B,)."""
        index = index.clamp(0, self.count - 1)
        sigma = torch.tensor(self._sigma, device=index.device)[index]
        noise = sigma * torch.tensor(self._noisy, device=index.device)[index]
        own = torch.tensor(self._label, device=index.device)[index]
        which = (sigma[:, None] > torch.tensor(SIGMAS, device=index.device)).sum(dim=1)
        return Asked(sigma, noise, which, torch.where(own < 0, label, own))

    def note(self, errors: Tensor, index: Tensor, difference: Tensor) -> Tensor:
        """`errors` with what the probes index (B,) have found, the difference x̂₀ − x₀ (B, C, H, W). An index outside
        of 0 … count − 1 changes nothing."""
        found = F.adaptive_avg_pool2d(difference.square().mean(dim=1, keepdim=True), 2).flatten(1)  # (B, 4)
        here = torch.arange(self.count, device=index.device) == index[:, None]
        return torch.where(here[:, :, None], found[:, None], errors)

    def statistics(self, errors: Tensor, dims: int) -> dict[str, Tensor]:
        """Of all probes' errors (B, count, 4), by name, (B,) each."""
        logs = errors.clamp(min=LEAST_ERROR).log()
        whole = errors.mean(dim=2)
        log_whole = whole.clamp(min=LEAST_ERROR).log()
        found: dict[str, Tensor] = {}
        for i, sigma in enumerate(SIGMAS):
            found[f"log_denoising_error_{sigma:g}"] = log_whole[:, i]
            found |= {f"log_denoising_error_{sigma:g}_{name}": logs[:, i, q] for q, name in enumerate(QUADRANTS)}
        for i, sigma in enumerate(CLEAN_SIGMAS, start=len(SIGMAS)):
            found[f"log_score_norm_{sigma:g}"] = 0.5 * (log_whole[:, i] + math.log(dims)) - 2 * math.log(sigma)
        if self.labels:
            nats = 0.5 * dims * whole / LABEL_SIGMA**2
            given = nats[:, self.count - self.labels :]
            found["label_marginal"] = math.log(self.labels) - torch.logsumexp(-given, dim=1)
            found["label_gain"] = nats[:, SIGMAS.index(LABEL_SIGMA)] - given.amin(dim=1)
            found["label_spread"] = given.std(dim=1, unbiased=False)
        return found


def surprise(denoised: Denoised, x: Tensor, labels: Tensor) -> Tensor:
    """(B, H, W): |x − reconstruction| on the scale of −1 … 1, summed over channels, in the mean over noise of
    MAP_SIGMAS."""
    x0, seed = 2 * x - 1, _random.image_seed(x)
    none, one = torch.zeros_like(seed), torch.ones(len(x), device=x.device)
    total = torch.zeros_like(x[:, 0])
    for i, sigma in enumerate(MAP_SIGMAS):
        noisy = x0 + sigma * _random.normal(seed, none, i, MAP_DRAW, x.shape[1:])
        total = total + (denoised(noisy, sigma * one, labels, one) - x0).abs().sum(dim=1)
    return total / len(MAP_SIGMAS)


def probe(
    probes: Probes,
    probed: Probed,
    errors: Tensor,
    features: Tensor,
    tick: Tensor,
    each: int,
    image: tuple[Tensor, Tensor, Tensor],
    draw: int,
) -> tuple[Tensor, Tensor]:
    """`errors` and `features` after those probes, `each` of them, that fall to the ticks (B,) of a score that does
    something else there as well. image: x₀ (B, C, H, W) on the scale −1 … 1, the seed (B,) of its noise, and its label
    (B,); draw: of the noise."""
    x0, seed, label = image
    none = torch.zeros_like(seed)
    for j in range(each):
        index = tick * each + j
        asked = probes.at(index, label)
        noise = _random.normal(seed, none, asked.which, draw, x0.shape[1:])
        found, middle = probed(x0 + column(asked.noise) * noise, asked.sigma, asked.label)
        errors, features = probes.note(errors, index, found - x0), note_features(features, index, middle)
    return errors, features


def no_features(x: Tensor, channels: int) -> Tensor:
    """(B, F) before anything is known; channels: K, of the network's coarsest level."""
    return x.new_zeros(len(x), channels * PLACES**2)


def note_features(features: Tensor, index: Tensor, middle: Tensor) -> Tensor:
    """`features` with what the probes index (B,) have left in the network's middle (B, K, H', W'); only the one at
    FEATURE_SIGMA changes anything."""
    found = F.adaptive_avg_pool2d(middle.float(), PLACES).flatten(1)
    return torch.where((index == SIGMAS.index(FEATURE_SIGMA))[:, None], found, features)


def per_tick(probes: Probes, ticks: int) -> int:
    """Probes at each of so many ticks, that there be room for all."""
    return -(-probes.count // ticks)
