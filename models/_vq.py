"""A discrete autoencoder: an image as a few codes, each the nearest of K vectors (VQ-VAE, van den Oord et al., arXiv
1711.00937). For families that learn codes as one learns a language.

What differs from the paper: the encoder's outputs have a fixed length (arXiv 2110.04627 does alike), so that the scale
of the codebook is known; its vectors follow them by exponential moving averages, not by a loss (the paper's appendix
A.1), and those that nothing is near to any more begin anew at an encoder's output (arXiv 2005.00341, §3.1), so that all
K stay in use; a patch may have several codes, each for a part of z and from a codebook of its own (product
quantisation, as in arXiv 1910.05453, §3.3); the decoder puts out a likelihood of 8-bit pixels, a logistic each: the
means learn at one scale for all pixels, as the paper's do, and the scales learn what that leaves; going up, the decoder
shuffles pixels, which leaves no checkerboard of overlapping kernels.

    variable      paper
    z             z_e(x), the encoder's outputs
    vectors       e, the K vectors of the codebook
    codes         q(z | x), one-hot: the index of the nearest vector
    commitment    β
    scale         log of the scale that the means learn at, where black is −1 and white is 1

    B    images, C × H × W        T    patches of an image, H/4 × W/4 in reading order
    G    codes of a patch         D    dimensions of a vector
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models._likelihoods import LogisticMixture
from models._nn import at_least, zeroed
from models._protocol import ImageSpace

PATCH = 4  # pixels, each way
NOT_YET = 0.5  # what a preview shows where no code has been drawn
DEAD, AGAIN = 0.03, 0.1  # parts of an equal share of the codes: a vector with less than one begins anew with the other


class Codebook(nn.Module):
    """K vectors, which move by averages of what they stand for (online k-means): no parameters, only buffers."""

    vectors: Tensor  # (K, D)
    shares: Tensor  # (K,) of all codes, averaged over about 1 / (1 − decay) batches

    def __init__(self, codes: int, dims: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("vectors", torch.randn(codes, dims))
        self.register_buffer("shares", torch.full((codes,), 1 / codes))

    def begin(self, z: Tensor) -> None:
        """Put every vector where one of z (N, D) is."""
        self.vectors.copy_(self._some(z, torch.ones_like(z[:, 0]), len(self.vectors)))
        self.shares.fill_(1 / len(self.shares))

    def forward(self, z: Tensor) -> Tensor:
        """The nearest vector's index (N,) for each of z (N, D). In float32 whatever the autocast."""
        with torch.autocast(z.device.type, enabled=False):
            half_squares = self.vectors.square().sum(dim=1) / 2
            return torch.addmm(half_squares, at_least(4, z.float()), self.vectors.mT, alpha=-1).argmin(dim=1)[: len(z)]

    @torch.no_grad()
    def follow(self, z: Tensor, codes: Tensor) -> None:
        """One step of the moving averages, with γ = `decay`, n_k the number and Σ_k the sum of the z with code k:

            p_k ← γ p_k + (1 − γ) n_k / N          e_k ← (γ p_k e_k + (1 − γ) Σ_k / N) / (the new p_k)

        which is eq. 6 to 8 of the paper's appendix with sums over a batch divided by its size N. Then dead vectors
        begin anew at random ones of z, the likelier the worse they are represented (as in k-means++).
        """
        gamma, n, k = self.decay, len(z), len(self.shares)
        z = z.to(self.vectors)
        error = (z - self.vectors[codes]).square().sum(dim=1)
        share = torch.bincount(codes, minlength=k).to(self.shares) / n
        total = torch.zeros_like(self.vectors).index_add_(0, codes, z) / n
        moved = gamma * self.shares[:, None] * self.vectors + (1 - gamma) * total
        self.shares.copy_(gamma * self.shares + (1 - gamma) * share)
        self.vectors.copy_(moved / self.shares[:, None])
        dead = (self.shares < DEAD / k).nonzero()[:, 0]
        if len(dead):
            self.vectors.index_copy_(0, dead, self._some(z, error, len(dead)))
            self.shares.index_fill_(0, dead, AGAIN / k)

    def _some(self, z: Tensor, weight: Tensor, n: int) -> Tensor:
        """(n, D) random ones of z by weight (N,), none twice where there are enough; a trace of noise tells copies
        apart."""
        index = torch.multinomial(weight.float() + 1e-9, n, replacement=n > len(z))
        some = z.to(self.vectors)[index]
        return some + 1e-3 * z.std().to(some) * torch.randn_like(some)

    def mean(self) -> Tensor:
        """(D,) of the vectors, by how frequent their codes are."""
        return (self.shares[:, None] * self.vectors).sum(dim=0) / self.shares.sum()

    def metrics(self) -> dict[str, Tensor]:
        """Over about the last 1 / (1 − decay) batches: the perplexity of the codes (K if all are as frequent), and the
        share of the vectors that have at least a tenth of an equal share of the codes."""
        p = self.shares / self.shares.sum()
        return {
            "perplexity": (-torch.special.xlogy(p, p).sum()).exp(),
            "usage": (p > 0.1 / len(p)).float().mean(),
        }


class Residual(nn.Module):
    """x + f(x) with a 3×3 and a 1×1 convolution (§4.1), the identity at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.second(F.silu(self.first(F.silu(x))))
        return out


class DiscreteAutoencoder(nn.Module):
    """Images -> T patches of G codes in 0 … K − 1 -> the parameters of the pixels' likelihood.

    width         channels at a quarter of the image's resolution; half of them above
    blocks        residual blocks at a quarter of the resolution, on either side, and in the decoder above
    groups, codes, dims    G, K and D

    Raises `ValueError` that names the field, its value and what would be right.
    """

    def __init__(
        self,
        space: ImageSpace,
        width: int,
        blocks: int,
        groups: int,
        codes: int,
        dims: int,
        decay: float,
        commitment: float,
        scale: float,
    ) -> None:
        super().__init__()
        _check(space, width, blocks, groups, codes, dims, decay, commitment)
        self.likelihood, self.commitment, self.scale = LogisticMixture(space.channels, 1), commitment, scale
        self.height, self.width = space.height // PATCH, space.width // PATCH
        half = width // 2
        self.encoder = nn.Sequential(
            nn.Conv2d(space.channels, half, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(half, width, 4, stride=2, padding=1),
            *(Residual(width) for _ in range(blocks)),
            nn.SiLU(),
            nn.Conv2d(width, groups * dims, 1),
        )
        self.codebooks = nn.ModuleList(Codebook(codes, dims, decay) for _ in range(groups))
        self.decoder = nn.Sequential(
            nn.Conv2d(groups * dims, width, 3, padding=1),
            *(Residual(width) for _ in range(blocks)),
            nn.SiLU(),
            nn.Conv2d(width, 4 * half, 1),
            nn.PixelShuffle(2),
            *(Residual(half) for _ in range(blocks)),
            nn.SiLU(),
        )
        for module in (*self.encoder.modules(), *self.decoder.modules()):
            if isinstance(module, nn.Conv2d) and module.weight.any():  # not those of the residuals that begin at zero
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        self.mean, self.log_scale = (nn.Conv2d(half, 4 * space.channels, 3, padding=1) for _ in range(2))
        with torch.no_grad():
            for head, value in ((self.mean, 0.0), (self.log_scale, scale)):
                head.weight.mul_(0.1)
                head.bias.fill_(value)  # type: ignore[union-attr]

    @property
    def _books(self) -> list[Codebook]:
        return cast("list[Codebook]", list(self.codebooks))

    @property
    def tokens(self) -> int:
        """T"""
        return self.height * self.width

    def prepare(self, x: Tensor) -> None:
        """Put the codebooks where the untrained encoder puts the images x (B, C, H, W)."""
        for book, z in zip(self._books, self._outputs(x).flatten(0, 1).unbind(dim=1), strict=True):
            book.begin(z)

    def encode(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> codes (B, T, G) int64."""
        return self.nearest(x)[0]

    def nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`encode`, and how far z_e is from the vectors that stand for it: (B,) mean squares."""
        z = self._outputs(x)
        codes = self._codes(z)
        return codes, (z - self._vectors(codes)).square().mean(dim=(1, 2, 3))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, T, G) -> the parameters of the likelihood (B, P, H, W) float32."""
        return self._params(self._vectors(codes))

    def log_prob(self, x: Tensor, codes: Tensor) -> Tensor:
        """(B,) nats: log p(x | codes)."""
        return self.likelihood.log_prob(self.decode(codes), x).sum(dim=(1, 2))

    def params(self, codes: Tensor, known: Tensor) -> Tensor:
        """`decode` of images of which only the patches where known (B, T) holds have been drawn: the mean of each
        codebook stands for the others."""
        anywhere = torch.stack([book.mean() for book in self._books])
        return self._params(torch.where(known[..., None, None], self._vectors(codes), anywhere))

    def median(self, params: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1]: what to show of the likelihood's parameters (B, P, H, W).

        The median of a logistic is its location, which is what has learnt to be near to the pixel. The expected level,
        of what is cut off at black and white, is drawn towards grey wherever the scale is broad.
        """
        location = params[:, 1 : 1 + self.likelihood.channels]
        return ((location + 1) / 2).clamp(0.0, 1.0)

    def veiled(self, x: Tensor, known: Tensor) -> Tensor:
        """Images x (B, C, H, W), grey in the patches that are not known (B, T)."""
        seen = known.view(-1, 1, self.height, self.width)
        return torch.where(seen.repeat_interleave(PATCH, dim=2).repeat_interleave(PATCH, dim=3), x, NOT_YET)

    def loss(self, x: Tensor, quantised: bool = True) -> tuple[Tensor, Mapping[str, Tensor]]:
        """−log p(x | z_q) + β |z_e − sg(e)|², in nats per dimension of the image and squares per dimension of a vector;
        and what to log. The gradient passes through the choice of the vector as if it were none (straight-through,
        §3.2). Moves the codebooks.

        −log p(x | z_q) stands here twice: at `scale`, where everything learns but the scales, and at the scales, which
        alone learn there. Were the means to learn at the scales too, pixels that are hard to tell would become broad
        and teach little more (arXiv 2203.09168): small shapes stayed blots, while the codes told flat greys exactly.

        quantised: False gives the decoder z_e itself, for a beginning: the codebooks then find an encoder that tells
        images apart, where the encoder would else learn to tell no more than poor codebooks can say.
        """
        z = self._outputs(x)
        codes = self._codes(z.detach())
        chosen = self._vectors(codes)
        features = self._features(straight_through(z, chosen) if quantised else z)
        mean, log_scale = self._pixels(self.mean, features), self._pixels(self.log_scale, features.detach())
        dims = x[0].numel()
        at_one = -self._log_prob(x, mean, torch.full_like(log_scale, self.scale)).mean() / dims
        reconstruction = -self._log_prob(x, mean.detach(), log_scale).mean() / dims
        distance = F.mse_loss(z, chosen)
        logged = []
        for g, book in enumerate(self._books):
            book.follow(z.detach()[:, :, g].flatten(0, 1), codes[:, :, g].flatten())
            logged.append(book.metrics())
        metrics = {name: torch.stack([each[name] for each in logged]).mean() for name in logged[0]}
        metrics |= {"reconstruction": reconstruction.detach(), "distance": distance.detach()}
        return at_one + reconstruction + self.commitment * distance, metrics

    def _codes(self, z: Tensor) -> Tensor:
        """(B, T, G, D) -> (B, T, G)"""
        each = zip(self._books, z.flatten(0, 1).unbind(dim=1), strict=True)
        return torch.stack([book(part) for book, part in each], dim=1).view(z.shape[:3])

    def _vectors(self, codes: Tensor) -> Tensor:
        """(B, T, G) -> (B, T, G, D)"""
        each = zip(self._books, codes.unbind(dim=2), strict=True)
        return torch.stack([book.vectors[part] for book, part in each], dim=2)

    def _outputs(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> z_e (B, T, G, D) float32, whose mean square over D is one."""
        z: Tensor = self.encoder(2 * at_least(2, x) - 1)[: len(x)]
        z = z.flatten(2).transpose(1, 2).float()
        z = z.reshape(len(x), self.tokens, len(self.codebooks), -1)
        return F.rms_norm(z, z.shape[3:], eps=1e-6)

    def _features(self, vectors: Tensor) -> Tensor:
        """(B, T, G, D) -> (B, ·, H/2, W/2)"""
        grid = at_least(2, vectors).flatten(2).transpose(1, 2)
        features: Tensor = self.decoder(grid.reshape(len(grid), -1, self.height, self.width))
        return features[: len(vectors)]

    def _params(self, vectors: Tensor) -> Tensor:
        """(B, T, G, D) -> (B, P, H, W) float32"""
        features = self._features(vectors)
        return self._joined(self._pixels(self.mean, features), self._pixels(self.log_scale, features))

    def _pixels(self, head: nn.Module, features: Tensor) -> Tensor:
        """(B, C, H, W) float32"""
        return F.pixel_shuffle(head(at_least(2, features))[: len(features)], 2).float()

    def _joined(self, mean: Tensor, log_scale: Tensor) -> Tensor:
        """The parameters of a mixture of one logistic, whose weight's logit is any number."""
        return torch.cat([torch.zeros_like(mean[:, :1]), mean, log_scale], dim=1)

    def _log_prob(self, x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
        return self.likelihood.log_prob(self._joined(mean, log_scale), x).sum(dim=(1, 2))


def straight_through(z: Tensor, chosen: Tensor) -> Tensor:
    """`chosen` forward; backward the gradient goes to z unchanged."""
    return z + (chosen - z).detach()


def _check(
    space: ImageSpace, width: int, blocks: int, groups: int, codes: int, dims: int, decay: float, commitment: float
) -> None:
    if space.height % PATCH or space.width % PATCH or not space.height or not space.width:
        raise ValueError(f"image: {space.width}×{space.height}; width and height must be multiples of {PATCH}")
    if width < 2 or width % 2:
        raise ValueError(f"width: {width}; an even number of channels, half of which are used at higher resolutions")
    for name, value, least in (("blocks", blocks, 0), ("groups", groups, 1), ("codes", codes, 2), ("dims", dims, 1)):
        if value < least:
            raise ValueError(f"{name}: {value}; at least {least}")
    if not 0 <= decay < 1:
        raise ValueError(f"decay: {decay} is not in [0, 1)")
    if commitment < 0:
        raise ValueError(f"commitment: {commitment}; at least 0")
