"""Score-based generative modelling through stochastic differential equations (Song, Sohl-Dickstein, Kingma, Kumar,
Ermon and Poole, arXiv 2011.13456), class-conditional.

Data become noise by dx = f(t) x dt + g(t) dw from t = 0 to 1. All of the paper's SDEs leave x_t = α_t x₀ + σ_t ε:

    vp         f = −½ β_t, g² = β_t                    α = e^(−B/2), σ² = 1 − e^(−B)          (eq. 11, appendix B)
    sub-vp     f = −½ β_t, g² = β_t (1 − e^(−2B))      α = e^(−B/2), σ = 1 − e^(−B)           (eq. 12, appendix B)
    ve         f = 0, g² = dσ²/dt                      α = 1, σ = σ_min (σ_max / σ_min)^t     (eq. 9, appendix C)

with β_t = β_0 + t (β_1 − β_0) and B = ∫₀ᵗ β. A network learns the score s = ∇ log p_t(x) = −E[ε | x] / σ_t, and noise
becomes data by the reverse SDE (eq. 6) or by the probability-flow ODE (eq. 13), which also has a likelihood (eq. 39):

    dx = (f x − g² s) dt + g dw̄            dx = (f x − ½ g² s) dt

What differs from the paper: the network sees cos φ x₀ + sin φ ε, tan φ = ρ = σ_t / α_t, and predicts
v = cos φ ε − sin φ x₀ (2202.00512), whichever the SDE, so that one network knows all of them; denoising score matching
with λ = g² as for maximum likelihood (2101.09258) for a share of the batch, and λ = σ² (1 + ρ²) at angles φ that are
drawn evenly for the rest; labels with classifier-free guidance (2207.12598); time ends where ρ is 0.6 half levels
instead of at 10⁻⁵, and images are dequantised by the noise there (`models._continuous_flow`); steps begin evenly in s,
where ρ^(1/14) is linear (2206.00364, eq. 5), and the ODE's are taken in ρ; the corrector's step size is the paper's in
expectation.

    variable    paper
    ratio       ρ                                       velocity    v
    drift       f                                       dispersion  g²
    slope       dx/ds of the ODE, from which the reverse SDE's drift follows too:  f x − g² s = 2 (f x − ½ g² s) − f x
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from models import _continuous_flow, _ode, _solvers
from models._continuous_flow import LAST_NOISE, Flow, views
from models._diffusion import column, stratified
from models._nn import guided
from models._protocol import Batch, ImageSpace

SOLVERS = ("heun", "euler", "bogacki-shampine", "euler-maruyama", "predictor-corrector")
EVALUATIONS = {"predictor-corrector": 2}
MAX_STEPS = 1000
POWER = 14  # the root of ρ that is linear in s: nearly its logarithm


@dataclass(frozen=True)
class Config(_continuous_flow.Config):
    """The SDE, and what `_continuous_flow.Config` has."""

    sde: str = "vp"  # or "sub-vp", "ve"
    beta: tuple[float, float] = (0.1, 20.0)  # β_0, β_1 of vp and sub-vp
    sigma_max: float = 50.0  # of ve
    corrector_snr: float = 0.16  # r of the Langevin corrector (algorithm 4)
    score_steps: int = 32


# ------------------------------------------------------------------------------------------------------------------ SDE


class SDE(abc.ABC):
    """A linear SDE by its kernel x_t = α_t x₀ + σ_t ε, as functions of ρ = σ / α, which rises with t. Any shape."""

    @abc.abstractmethod
    def time(self, ratio: Tensor) -> Tensor:
        """t where σ_t / α_t is the ratio."""

    @abc.abstractmethod
    def kernel(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(α, σ)"""

    @abc.abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(f, g²)"""


@dataclass(frozen=True)
class _Beta(SDE):
    first: float
    last: float

    def _integral(self, t: Tensor) -> Tensor:
        return self.first * t + 0.5 * (self.last - self.first) * t.square()

    def _inverse(self, integral: Tensor) -> Tensor:
        """t where ∫β is `integral`: the root of the quadratic, in the form that does not cancel."""
        return 2 * integral / (self.first + (self.first**2 + 2 * (self.last - self.first) * integral).sqrt())

    def _beta(self, t: Tensor) -> Tensor:
        return self.first + t * (self.last - self.first)


@final
class VP(_Beta):
    """Variance preserving."""

    def time(self, ratio: Tensor) -> Tensor:
        return self._inverse(ratio.square().log1p())

    def kernel(self, t: Tensor) -> tuple[Tensor, Tensor]:
        b = self._integral(t)
        return torch.exp(-0.5 * b), (-torch.expm1(-b)).sqrt()

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -0.5 * self._beta(t), self._beta(t)


@final
class SubVP(_Beta):
    """Its variance is below VP's at every time."""

    def time(self, ratio: Tensor) -> Tensor:
        return self._inverse(2 * torch.asinh(ratio / 2))

    def kernel(self, t: Tensor) -> tuple[Tensor, Tensor]:
        b = self._integral(t)
        return torch.exp(-0.5 * b), -torch.expm1(-b)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -0.5 * self._beta(t), -self._beta(t) * torch.expm1(-2 * self._integral(t))


@final
@dataclass(frozen=True)
class VE(SDE):
    """Variance exploding."""

    least: float
    most: float

    def time(self, ratio: Tensor) -> Tensor:
        return (ratio / self.least).log() / math.log(self.most / self.least)

    def kernel(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), self.least * (self.most / self.least) ** t

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), 2 * math.log(self.most / self.least) * self.kernel(t)[1].square()


def sde_of(config: Config) -> SDE:
    if config.sde == "ve":
        return VE(LAST_NOISE, config.sigma_max)
    return (VP if config.sde == "vp" else SubVP)(*config.beta)


# ---------------------------------------------------------------------------------------------------------------- model


class Model(Flow):
    """The SDE, its objective and its stochastic solvers; network, ODE solvers and likelihood are `Flow`'s."""

    def __init__(self, config: Config, space: ImageSpace) -> None:
        _validate(config)
        sde = sde_of(config)
        first = sde.kernel(torch.ones((), dtype=torch.float64))
        last = sde.kernel(sde.time(torch.tensor(LAST_NOISE, dtype=torch.float64)))
        super().__init__(
            "score_sde",
            config,
            space,
            start=float(first[1]),
            end=(float(last[0]), float(last[1])),
            solvers=SOLVERS,
            max_steps=MAX_STEPS,
            evaluations=EVALUATIONS,
        )
        self.config, self.sde = config, sde
        self.first_ratio = float(first[1] / first[0])

    # ---- the way

    def way(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """(ρ, dρ/ds)"""
        first, last = self.first_ratio ** (1 / POWER), LAST_NOISE ** (1 / POWER)
        root = first + s * (last - first)
        return root**POWER, POWER * root ** (POWER - 1) * (last - first)

    def back(self, u: Tensor) -> Tensor:
        """s where ρ is u."""
        first, last = self.first_ratio ** (1 / POWER), LAST_NOISE ** (1 / POWER)
        s: Tensor = (u ** (1 / POWER) - first) / (last - first)
        return s

    def _velocity(self, x: Tensor, ratio: Tensor, labels: Tensor) -> Tensor:
        """v (B, C, H, W) at x = x₀ + ρ ε. The network is told φ, and ρ where it is small, on the scale of s."""
        out: Tensor = self.network(self._shown(x, ratio), self.back(ratio), labels)
        return out

    def _shown(self, x: Tensor, ratio: Tensor) -> Tensor:
        """What the network sees of x."""
        cosine = (1 + ratio.square()).rsqrt()
        return views(column(cosine) * x, cosine, cosine * ratio, self.detail_periods)

    def denoised(self, x: Tensor, sigma: Tensor, labels: Tensor, guidance: Tensor) -> Tensor:
        """x̂₀ = cos² φ x − sin φ v, for x = x₀ + ρ ε: already in this family's terms."""
        ratio = sigma.clamp(LAST_NOISE, self.first_ratio)
        return self._image(x, guided(self._velocity, x, ratio, labels, guidance), ratio)

    def probed(self, x: Tensor, sigma: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        ratio = sigma.clamp(LAST_NOISE, self.first_ratio)
        velocity, middle = self.network.with_middle(self._shown(x, ratio), self.back(ratio), labels)
        return self._image(x, velocity, ratio), middle

    @staticmethod
    def _image(x: Tensor, velocity: Tensor, ratio: Tensor) -> Tensor:
        cosine = column((1 + ratio.square()).rsqrt())
        return cosine.square() * x - column(ratio) * cosine * velocity

    def field(self, x: Tensor, s: Tensor, labels: Tensor, guidance: Tensor) -> tuple[Tensor, Tensor]:
        """The probability-flow ODE (eq. 13): f x − ½ g² s = f x + ½ (g² / σ) ε̂, where ½ (g² / σ) dt/ds = α dρ/ds."""
        ratio, dratio_ds = self.way(s)
        t = self.sde.time(ratio)
        alpha = column(self.sde.kernel(t)[0])
        estimate = self.denoised(x / alpha, ratio, labels, guidance)
        noise = (x / alpha - estimate) / column(ratio)
        f, _ = self.sde.coefficients(t)
        slope = column(f * self._dt_ds(t, dratio_ds)) * x + alpha * column(dratio_ds) * noise
        return slope, estimate

    def _dt_ds(self, t: Tensor, dratio_ds: Tensor) -> Tensor:
        """dt/ds, from dρ/dt = g² / (2 α σ), which holds for every linear SDE."""
        alpha, sigma = self.sde.kernel(t)
        return dratio_ds * 2 * alpha * sigma / self.sde.coefficients(t)[1]

    # ---- training

    def objective(self, batch: Batch) -> Iterator[tuple[str, Tensor, Mapping[str, Tensor]]]:
        """Denoising score matching (eq. 7). With ε̂ = cos φ v + …, |ε̂ − ε|² is cos² φ |v̂ − v|²; and g² dt, the weight
        of |s|² in the likelihood, is 2 σ² d(log ρ): a share of the batch has log ρ drawn evenly and that weight."""
        b, device = len(batch.x), batch.x.device
        x0, noise = 2 * batch.x - 1, torch.randn_like(batch.x)
        low = round(self.config.low_noise_share * b)
        angles = [math.atan(LAST_NOISE), math.atan(self.first_ratio)]
        ratio = torch.cat(
            [
                LAST_NOISE * (self.first_ratio / LAST_NOISE) ** stratified(low, device),
                torch.tan(angles[0] + (angles[1] - angles[0]) * stratified(b - low, device)),
            ]
        )
        hidden = torch.rand(b, device=device) < self.config.label_dropout
        velocity = self._velocity(x0 + column(ratio) * noise, ratio, batch.labels.masked_fill(hidden, -1))
        cosine2 = 1 / (1 + ratio.square())
        target = column(cosine2.sqrt()) * (noise - column(ratio) * x0)
        squared = (velocity - target).square().mean(dim=(1, 2, 3))
        squared = torch.cat([cosine2[:low] * squared[:low], squared[low:]])
        loss = squared.mean()
        yield "network", loss, {"mse": loss.detach()}

    # ---- sampling

    def solver_table(self, solver: str, steps: int) -> Tensor:
        if solver not in EVALUATIONS and solver != "euler-maruyama":
            return super().solver_table(solver, steps)
        s = _ode.points(steps)
        ticks = [self._predictor(s)]
        if solver == "predictor-corrector":
            ticks.append(self._corrector(s[1:]))
        return _ode.ended(torch.stack(ticks, dim=1).flatten(0, 1), s[-1])

    def _here(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(t, dt/ds, f, g²)"""
        ratio, dratio_ds = self.way(s)
        t = self.sde.time(ratio)
        return t, self._dt_ds(t, dratio_ds), *self.sde.coefficients(t)

    def _predictor(self, s: Tensor) -> Tensor:
        """Euler–Maruyama for the reverse SDE (eq. 6): x ← x − [2 u − f x] Δ + g √Δ z, where u = slope / (dt/ds)."""
        t, dt_ds, f, g2 = (part[:-1] for part in self._here(s))
        step = t - self._here(s)[0][1:]
        return _tick(s[:-1], 1 + f * step, (g2 * step).sqrt(), -2 * step / dt_ds)

    def _corrector(self, s: Tensor) -> Tensor:
        """Langevin (algorithm 4): x ← x + η s + √(2 η) z with s = 2 (f x − u) / g² and η = 2 (r σ)², which is the
        paper's 2 (r |z| / |s|)² where |s| is what it is in expectation, √D / σ."""
        t, dt_ds, f, g2 = self._here(s)
        eta = 2 * (self.config.corrector_snr * self.sde.kernel(t)[1]).square()
        return _tick(s, 1 + 2 * eta * f / g2, (2 * eta).sqrt(), -2 * eta / (g2 * dt_ds))


def _tick(s: Tensor, a: Tensor, d: Tensor, b: Tensor) -> Tensor:
    """Rows of a table, for a prediction that is the slope."""
    ticks = s.new_zeros(len(s), _solvers.PREDICTION + 1)
    ticks[:, _solvers.TIME], ticks[:, _solvers.POINT], ticks[:, _solvers.NOISE] = s, a, d
    ticks[:, _solvers.PREDICTION] = b
    return ticks


def _validate(config: Config) -> None:
    if config.sde not in ("vp", "sub-vp", "ve"):
        raise ValueError(f"sde: {config.sde!r}; there are vp, sub-vp, ve")
    if len(config.beta) != 2 or not 0 < config.beta[0] < config.beta[1]:
        raise ValueError(f"beta: {config.beta}; two positive numbers, the first the smaller one")
    if config.sigma_max < 1:
        raise ValueError(f"sigma_max: {config.sigma_max}; less noise than the data's own range would not hide them")
    if not 0 < config.corrector_snr < 1:
        raise ValueError(f"corrector_snr: {config.corrector_snr} is not in 0 … 1")
