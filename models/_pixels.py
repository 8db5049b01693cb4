"""For families that draw an image pixel by pixel, and know the distribution of each given those before: a preview of
the image, and what a score tells beside the likelihood.

The surprise of a pixel is −log p_i less what was to be expected, the entropy of p(· | x_<i); over images that the model
itself draws, surprises have mean zero and are uncorrelated. Statistics of it, which cost no further pass:

    entropy            nats, Σ_i entropy of p(x_i | x_<i): the −log_prob to be expected
    worst_tile         nats, largest surprise of a tile of TILE × TILE pixels
    least_tile         nats, smallest: where an image says less than it should, as a blurred one does
    surprise_square    nats², mean square of a pixel's surprise
    autocorrelation    nats², mean product of a pixel's surprise with its right and lower neighbour's

And feature vectors, since what is much for one place of an image is little for another:

    in each of GRID × GRID tiles that cover the image (fewer where it has fewer pixels), nats
    entropy_by_tile    mean entropy
    surprise_by_tile   mean surprise
    spread_by_tile     root of the surprise's mean square
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from models._protocol import Score

NOT_YET = 0.5  # what a preview shows where no pixel has been drawn
TILE = 4
GRID = 7
FEATURES = ("entropy_by_tile", "surprise_by_tile", "spread_by_tile")
STATISTICS = ("entropy", "worst_tile", "least_tile", "surprise_square", "autocorrelation")


def picture(levels: Tensor, drawn: Tensor, shape: tuple[int, int, int], count: int) -> Tensor:
    """(B, C, H, W) in [0, 1] of levels (B, H·W, C), each one of `count`; grey from pixel `drawn` (B,) on."""
    c, h, w = shape
    grid = levels.to(torch.float32) if count == 256 else (levels * (255 / (count - 1))).round()
    known = torch.arange(h * w, device=drawn.device) < drawn[:, None]
    return torch.where(known[:, :, None], grid / 255, NOT_YET).view(-1, h, w, c).permute(0, 3, 1, 2)


def score(log_prob: Tensor, entropy: Tensor) -> Score:
    """Of log p(x_i | x_<i) and the entropy of p(· | x_<i), both (B, H, W) nats."""
    surprises = surprise(log_prob, entropy)
    by_tile = tiles(surprises, TILE)
    return Score(
        log_prob=log_prob.sum(dim=(1, 2)),
        per_pixel=log_prob,
        statistics={
            "entropy": entropy.sum(dim=(1, 2)),
            "worst_tile": by_tile.amax(dim=(1, 2)),
            "least_tile": by_tile.amin(dim=(1, 2)),
            "surprise_square": surprises.square().mean(dim=(1, 2)),
            "autocorrelation": neighbour_product(surprises),
        },
        features=dict(zip(FEATURES, by_tile_of(surprises, entropy), strict=True)),
    )


def feature_sizes(height: int, width: int) -> dict[str, int]:
    """Of `score`, for images of that size."""
    return dict.fromkeys(FEATURES, min(height, GRID) * min(width, GRID))


def by_tile_of(surprises: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """FEATURES (B, tiles) of surprises and entropies (B, H, W)."""
    size = min(surprises.shape[1], GRID), min(surprises.shape[2], GRID)
    each = torch.stack([entropy, surprises, surprises.square()], dim=1)
    of_entropy, mean, square = F.adaptive_avg_pool2d(each, size).flatten(2).unbind(dim=1)
    return of_entropy, mean, square.sqrt()


def surprise(log_prob: Tensor, entropy: Tensor) -> Tensor:
    """(B, H, W) nats of log p(x_i | x_<i) and the entropy of p(· | x_<i)."""
    return -log_prob - entropy


def terms(logits: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """log p of levels (...) under the softmax of logits (..., K), and its entropy: (...) float32 nats each."""
    log_probs = logits.float().log_softmax(dim=-1)
    return log_probs.gather(-1, levels[..., None])[..., 0], -(log_probs.exp() * log_probs).sum(dim=-1)


def tiles(values: Tensor, size: int) -> Tensor:
    """Sums of values (B, H, W) over tiles of size × size; those at the right and lower edge may be cut."""
    return F.avg_pool2d(values[:, None], size, ceil_mode=True, divisor_override=1)[:, 0]


def neighbour_product(values: Tensor) -> Tensor:
    """(B,) mean over (B, H, W) of a value times its right or lower neighbour; 0 for a single pixel."""
    right, lower = values[..., 1:] * values[..., :-1], values[:, 1:] * values[:, :-1]
    pairs = right[0].numel() + lower[0].numel()
    return (right.sum(dim=(1, 2)) + lower.sum(dim=(1, 2))) / max(1, pairs)
