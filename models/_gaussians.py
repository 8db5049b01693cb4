"""K Gaussians over the pixels of dequantised images, with full or low-rank covariances: densities, draws, and the
M-step of expectation-maximisation, as tensors and pure functions.

The dequantised image of levels k is k + u, u uniform on the unit cube. Nothing here draws u: what is needed are
averages over it, and those are closed. With y = k + ½ in the middle of the cell, and V = 1/12 the variance of u,

    E_u log N(k + u; μ, Σ) = log N(y; μ, Σ) − ½ V tr Σ⁻¹                                                      (1)

is at most log P(k), the mass that the Gaussian has in the cell (Jensen). For a mixture with weights π

    log Σ_k π_k exp(E_u log N(k + u; μ_k, Σ_k))                                                               (2)

is at most E_u log p(k + u), again by Jensen, and EM (Dempster, Laird and Rubin 1977) climbs it: the responsibilities
are its softmax, and in the maximum over μ and Σ the noise adds V to the diagonal of the second moments. So V is a floor
for every variance that the maths puts there: no other regularisation is needed, and constant pixels do no harm.

    variable        meaning
    y               (B, D) float64, levels 0 … 255 plus ½
    r               (B, K) responsibilities; for a moment where components are known, one-hot
    A               (K, D, D) lower triangular, A (y − μ) is white: Σ⁻¹ = Aᵀ A
    W, psi          (K, D, q), (K, D): Σ = W Wᵀ + diag ψ, a factor analyser (Ghahramani and Hinton 1996)
    beta            (K, q, D): E[z | y] = β (y − μ) for the factors z of y = μ + W z + noise
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self, final

import torch
from torch import Tensor

NOISE_VARIANCE = 1 / 12  # V, of u
LOG_2PI = math.log(2 * math.pi)
Sums = tuple[Tensor, ...]


@dataclass(frozen=True)
class Gaussians(abc.ABC):
    """K Gaussians of D dimensions. float64."""

    mean: Tensor  # (K, D)

    @staticmethod
    @abc.abstractmethod
    def parameters(k: int, dims: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the unconstrained tensors that a covariance is kept in."""

    @abc.abstractmethod
    def to_parameters(self) -> dict[str, Tensor]:
        """The covariances as those tensors."""

    @classmethod
    @abc.abstractmethod
    def from_parameters(cls, mean: Tensor, kept: Mapping[str, Tensor]) -> Self:
        """The Gaussians that were kept."""

    @abc.abstractmethod
    def mahalanobis(self, y: Tensor) -> Tensor:
        """(B, K) squared distances (y − μ)ᵀ Σ⁻¹ (y − μ)."""

    @abc.abstractmethod
    def residuals(self, y: Tensor) -> Tensor:
        """(B, K, D) squares of (y_i − E[y_i | all other pixels]) over the standard deviation that y_i has then: with
        P = Σ⁻¹, (P (y − μ))_i² / P_ii (Rasmussen and Williams 2006, eq. 5.12)."""

    @property
    @abc.abstractmethod
    def log_det(self) -> Tensor:
        """(K,) log det Σ."""

    @property
    @abc.abstractmethod
    def inverse_trace(self) -> Tensor:
        """(K,) tr Σ⁻¹."""

    @abc.abstractmethod
    def sample(self, component: Tensor, noise: Tensor) -> Tensor:
        """(B, D) from standard normal noise (B, `noise_dims`), each row from its component (B,)."""

    @property
    @abc.abstractmethod
    def noise_dims(self) -> int:
        """How many standard normal numbers a sample takes."""

    @abc.abstractmethod
    def sums(self, y: Tensor, r: Tensor) -> Sums:
        """What `maximised` needs of the data, as sums over rows: those of parts of the data add up."""

    @abc.abstractmethod
    def maximised(self, sums: Sums) -> Self:
        """The M-step: Gaussians that raise Σ r E_u log N(k + u; μ, Σ) over the data summed up, to its maximum where it
        is closed. A component that nothing belongs to keeps its mean."""

    def log_density(self, y: Tensor) -> Tensor:
        """(B, K) nats: E_u log N(k + u), equation 1."""
        constant = self.log_det + self.mean.shape[1] * LOG_2PI + NOISE_VARIANCE * self.inverse_trace
        return -0.5 * (self.mahalanobis(y) + constant)


@final
@dataclass(frozen=True)
class Full(Gaussians):
    """Any covariance, by the inverse A of its Cholesky factor: row i of A is the regression of pixel i on those before
    it, so the density is one of pixel after pixel."""

    A: Tensor  # (K, D, D)

    @staticmethod
    def parameters(k: int, dims: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {"triangle": (k, dims * (dims + 1) // 2)}

    def to_parameters(self) -> dict[str, Tensor]:
        """A, row after row, without the zeros."""
        row, column = _lower(self.mean)
        return {"triangle": self.A[:, row, column]}

    @classmethod
    def from_parameters(cls, mean: Tensor, kept: Mapping[str, Tensor]) -> Self:
        A = mean.new_zeros(*mean.shape, mean.shape[1])
        row, column = _lower(mean)
        A[:, row, column] = kept["triangle"].double()
        return cls(mean, A)

    @classmethod
    def standard(cls, k: int, dims: int, device: torch.device) -> Self:
        """Somewhere to begin: the first M-step forgets it."""
        eye = torch.eye(dims, dtype=torch.float64, device=device)
        return cls(torch.full((k, dims), 128.0, dtype=torch.float64, device=device), eye.expand(k, -1, -1))

    def _white(self, y: Tensor) -> Tensor:
        return torch.einsum("kij,bkj->bki", self.A, y[:, None] - self.mean)

    def mahalanobis(self, y: Tensor) -> Tensor:
        return self._white(y).square().sum(dim=2)

    def residuals(self, y: Tensor) -> Tensor:
        precise = torch.einsum("kij,bki->bkj", self.A, self._white(y))
        return precise.square() / self.A.square().sum(dim=1)

    def terms(self, y: Tensor) -> Tensor:
        """(B, K, D) nats: E_u log N(k_i + u_i | those before), whose sum over i is `log_density`."""
        noise = NOISE_VARIANCE * self.A.square().sum(dim=2)
        return -0.5 * (self._white(y).square() + noise + LOG_2PI) + self._diagonal.abs().log()

    @property
    def _diagonal(self) -> Tensor:
        return self.A.diagonal(dim1=1, dim2=2)

    @property
    def log_det(self) -> Tensor:
        return -2 * self._diagonal.abs().log().sum(dim=1)

    @property
    def inverse_trace(self) -> Tensor:
        return self.A.square().sum(dim=(1, 2))

    @property
    def noise_dims(self) -> int:
        return self.mean.shape[1]

    def sample(self, component: Tensor, noise: Tensor) -> Tensor:
        """Every component that is asked for is drawn from in all rows: sums must not depend on who asks for which."""
        deviation = torch.zeros_like(noise)
        for k in sorted(set(component.tolist())):
            solved = torch.linalg.solve_triangular(self.A[k], noise.mT, upper=False).mT
            deviation = torch.where((component == k)[:, None], solved, deviation)
        return self.mean[component] + deviation

    def sums(self, y: Tensor, r: Tensor) -> Sums:
        first, second = torch.empty_like(self.mean), torch.empty_like(self.A)
        for k in range(len(self.mean)):
            d = y - self.mean[k]
            weighted = d * r[:, k, None]
            first[k], second[k] = weighted.sum(dim=0), weighted.mT @ d
        return r.sum(dim=0), first, second

    def maximised(self, sums: Sums) -> Self:
        n, first, second = sums
        n = _at_least_some(n)
        shift = first / n[:, None]
        covariance = second / n[:, None, None] - shift[:, :, None] * shift[:, None]
        eye = torch.eye(self.mean.shape[1], dtype=shift.dtype, device=shift.device)
        factor = torch.linalg.cholesky(covariance + NOISE_VARIANCE * eye)
        return type(self)(self.mean + shift, torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False))


@final
@dataclass(frozen=True)
class LowRank(Gaussians):
    """Σ = W Wᵀ + diag ψ: q factors that pixels share, and noise of each pixel's own."""

    W: Tensor  # (K, D, q)
    psi: Tensor  # (K, D)

    @staticmethod
    def parameters(k: int, dims: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {"factors": (k, dims, rank), "log_noise": (k, dims)}

    def to_parameters(self) -> dict[str, Tensor]:
        return {"factors": self.W, "log_noise": self.psi.log()}

    @classmethod
    def from_parameters(cls, mean: Tensor, kept: Mapping[str, Tensor]) -> Self:
        return cls(mean, kept["factors"].double(), kept["log_noise"].double().exp())

    @cached_property
    def _precise(self) -> Tensor:
        """(K, D, q): Ψ⁻¹ W"""
        return self.W / self.psi[:, :, None]

    @cached_property
    def _root(self) -> Tensor:
        """(K, q, q) Cholesky factor of I + Wᵀ Ψ⁻¹ W, the precision of the factors given an image."""
        eye = torch.eye(self.W.shape[2], dtype=self.W.dtype, device=self.W.device)
        root: Tensor = torch.linalg.cholesky(eye + self.W.mT @ self._precise)
        return root

    @cached_property
    def _whitened(self) -> Tensor:
        """(K, q, D) H = root⁻¹ Wᵀ Ψ⁻¹: by Woodbury's identity Σ⁻¹ = Ψ⁻¹ − Hᵀ H."""
        whitened: Tensor = torch.linalg.solve_triangular(self._root, self._precise.mT, upper=False)
        return whitened

    @cached_property
    def beta(self) -> Tensor:
        """(K, q, D)"""
        beta: Tensor = torch.linalg.solve_triangular(self._root.mT, self._whitened, upper=True)
        return beta

    def _apply(self, maps: Tensor, y: Tensor) -> Tensor:
        """(B, K, q): maps (K, q, D) of y − μ, as one matrix product."""
        k, q, dims = maps.shape
        centre = torch.einsum("kqd,kd->kq", maps, self.mean)
        return (y @ maps.reshape(k * q, dims).mT).view(-1, k, q) - centre

    def factors(self, y: Tensor) -> Tensor:
        """(B, K, q) E[z | y]."""
        return self._apply(self.beta, y)

    def mahalanobis(self, y: Tensor) -> Tensor:
        by_pixel = weighted_squares(y, self.mean, 1 / self.psi)
        return by_pixel - self._apply(self._whitened, y).square().sum(dim=2)

    def residuals(self, y: Tensor) -> Tensor:
        H = self._whitened
        precise = (y[:, None] - self.mean) / self.psi - torch.einsum("bkq,kqd->bkd", self._apply(H, y), H)
        return precise.square() / (1 / self.psi - H.square().sum(dim=1))

    @property
    def log_det(self) -> Tensor:
        return self.psi.log().sum(dim=1) + 2 * self._root.diagonal(dim1=1, dim2=2).log().sum(dim=1)

    @property
    def inverse_trace(self) -> Tensor:
        return (1 / self.psi).sum(dim=1) - self._whitened.square().sum(dim=(1, 2))

    @property
    def noise_dims(self) -> int:
        return self.W.shape[1] + self.W.shape[2]

    def sample(self, component: Tensor, noise: Tensor) -> Tensor:
        z, own = torch.split(noise, [self.W.shape[2], self.W.shape[1]], dim=1)
        shared = (self.W[component] @ z[:, :, None])[:, :, 0]
        return self.mean[component] + shared + self.psi[component].sqrt() * own

    @classmethod
    def around(cls, y: Tensor, centres: Tensor, nearest: Tensor, rank: int) -> Self:
        """A start for EM from images y (N, D), centres (K, D), and which of them is the nearest (N,): each factor is a
        random combination of a cluster's deviations, so a draw from its own covariance. torch's global generator."""
        W, psi = [], []
        for k in range(len(centres)):
            d = y[nearest == k] - centres[k]
            n = max(1, len(d))
            weights = torch.randn(len(d), rank, dtype=y.dtype, device=y.device)
            W.append(d.mT @ weights / math.sqrt(2 * n * rank))
            psi.append(d.square().sum(dim=0) / (2 * n) + NOISE_VARIANCE)
        return cls(centres, torch.stack(W), torch.stack(psi))

    def sums(self, y: Tensor, r: Tensor) -> Sums:
        n, (k, dims) = r.sum(dim=0), self.mean.shape
        moved = r.mT @ y - n[:, None] * self.mean
        squares = r.mT @ y.square() - (2 * moved + n[:, None] * self.mean) * self.mean
        z = r[:, :, None] * self.factors(y)
        with_factors = (y.mT @ z.flatten(1)).view(dims, k, -1).transpose(0, 1)
        return n, moved, squares, with_factors - self.mean[:, :, None] * z.sum(dim=0)[:, None]

    def maximised(self, sums: Sums) -> Self:
        """The mean's maximum, then one EM step of a factor analyser about it (Ghahramani and Hinton 1996, eq. 3 and 4,
        in a form that needs S βᵀ but never the second moments S themselves): neither lowers the objective."""
        n = _at_least_some(sums[0])
        shift, squares, with_factors = (s / n.view(-1, *(1,) * (s.dim() - 1)) for s in sums[1:])
        beta = self.beta
        moved = (beta @ shift[:, :, None])[:, :, 0]  # β δ
        S_beta = with_factors - shift[:, :, None] * moved[:, None] + NOISE_VARIANCE * beta.mT  # (K, D, q)
        eye = torch.eye(self.W.shape[2], dtype=shift.dtype, device=shift.device)
        second = eye - beta @ self.W + beta @ S_beta  # E[z zᵀ]
        W = torch.linalg.solve(second, S_beta, left=False)
        psi = squares - shift.square() + NOISE_VARIANCE - (W * S_beta).sum(dim=2)
        return type(self)(self.mean + shift, W, psi)


def _lower(mean: Tensor) -> Tensor:
    """(2, D (D + 1) / 2) rows and columns of a lower triangle, row after row, for means (K, D)."""
    return torch.tril_indices(mean.shape[1], mean.shape[1], device=mean.device)


def _at_least_some(n: Tensor) -> Tensor:
    """Sums of responsibilities to divide by."""
    return n.clamp(min=1e-10)


def weighted_squares(y: Tensor, mean: Tensor, weight: Tensor) -> Tensor:
    """(B, K): Σ_i weight (y − mean)², as matrix products."""
    weighted = weight * mean
    return y.square() @ weight.mT - 2 * (y @ weighted.mT) + (weighted * mean).sum(dim=1)


def add(a: Sums, b: Sums) -> Sums:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def concatenated(parts: Sequence[Gaussians]) -> Gaussians:
    """The Gaussians of all parts, which are of one kind, in order."""
    names = list(parts[0].__dataclass_fields__)
    return type(parts[0])(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
