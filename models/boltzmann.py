"""Boltzmann machines of layers: restricted (one hidden layer) and deep (two or three), class-conditional.

Restricted: Smolensky 1986; contrastive divergence, Hinton 2002; persistent chains, Tieleman 2008. Deep: Salakhutdinov
and Hinton 2009, from whom are the greedy start, the mean-field bound and the chains of the joint training. Over the
layers' states s₀ (the image's), s₁ … s_L (hidden) and the label y, the machine is

    p(x, h, y) ∝ e^{−E},   −E = a · s₀ + Σ_l b_l · s_l + Σ_l s_{l−1} W_l s_l + c_y · s_L

A layer is tied to its neighbours alone, so the even layers are independent of each other given the odd ones, and the
odd given the even. A Gibbs sweep draws all even layers, then all odd ones. What the rest needs is one function, the
free energy of the even layers, in which the odd ones are summed out:

    F(s₀, s₂) = −a · s₀ − b₂ · s₂ − Σ_{l odd} Σ_j log 2 cosh(½ (b_l + s_{l−1} W_l + s_{l+1} W_{l+1}ᵀ)_j)

Its difference between data and chains is the loss. With one hidden layer, −F − log Z is log p(x | y); with more, the
means μ of the even hidden layers and their entropy H give the mean-field bound −F(s₀, μ) + H(μ) − log Z.

Visible units. Grey images are neither bits nor Gaussian, so a pixel is a unit with 256 states: the exponential family
of two statistics (an exponential family harmonium, Welling et al. 2004), whether it is not black, and its level

    p(x_i | h) ∝ e^{u_i 1[x_i > 0] + θ_i x_i},   x_i = 0, 1/255, …, 1,     (u, θ) = a + W₁ s₁

It sums over the levels in closed form and is drawn exactly, and the machine has a likelihood of the 8-bit image: no
binarisation, no dequantisation.

What differs from the papers: all units are centred, which keeps learning well conditioned (arXiv 1311.1354): hidden
states are ±½, and s₀ is the statistics less their mean over the data. A label is no unit that is drawn: every class has
chains of its own, which is maximum likelihood of the pair (x, y) with the label's bias fitted in closed form. And log Z
is of each class, by annealed importance sampling both ways (`models._annealing`), once the weights are finished.

    variable                      paper
    states[l]                     s_l
    weights[l − 1], biases[l]     W_l; a, b_l
    top, labels                   c, y
    beta                          inverse temperature, of annealing
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import _annealing, _grey, _protocol, _random
from models._protocol import Batch, Draw, ImageSpace, Likelihood, OnePassDensity, Rows, Score, Spec, Steps

SOLVERS = ("persistent", "annealed")
ANNEALED = 0.8  # part of the sweeps over which "annealed" rises to the machine itself
BURN_IN = 100  # sweeps of the chains before their first use
_START = 0  # draw of a row's noise at tick 0 that no layer has: layers have 1 …

States = list[Tensor]  # of every layer, (B, units) each
Uniforms = Callable[[int, int], Tensor]  # (layer, n) -> (B, n) on (0, 1)


@dataclass(frozen=True)
class Config:
    """Everything that shapes the machine and its learning."""

    hidden: tuple[int, ...] = (320,)  # units of each hidden layer: one is an RBM, two or three a DBM
    chains: int = 200  # persistent, shared evenly by the classes; 0: contrastive divergence, chains begin at the data
    sweeps: int = 1  # of each chain at each step: k of CD-k
    pretraining: float = 0.3  # part of the steps in which a deep machine's layers are learnt one after the other
    mean_field: int = 10  # iterations, each of all layers
    decay: float = 1e-4  # weight of ½ |W|²: large weights mix slowly
    particles: int = 40  # of each class: chains that log Z is estimated from, and where samples begin
    temperatures: int = 1000  # β of the annealing that estimates log Z
    default_steps: int = 100  # Gibbs sweeps


def log_cosh(field: Tensor) -> Tensor:
    """Σ_j log 2 cosh(f_j / 2) over the last dimension: a layer of units ±½, summed out."""
    return (field.abs() / 2 + F.softplus(-field.abs())).sum(dim=-1)


# ---------------------------------------------------------------------------------------------------------------- model


@dataclass
class GibbsRows(Rows):
    seed: Tensor  # (B,)
    sample: Tensor  # (B,)
    label: Tensor  # (B,) of the chain: drawn where none was asked for; 0 where there are no classes
    rise: Tensor  # (B,) float64, of β at each tick until it is 1
    visible: Tensor  # (B, C·H·W) uint8, the image itself; black before the first sweep
    hidden: tuple[Tensor, ...]  # (B, units) bool each


class Model(_protocol.Model, OnePassDensity):
    """The machine, its learning, Gibbs sampling and likelihood.

    Samples show the expected image given the first hidden layer. By solver, a chain begins at a stored particle of its
    class, chosen by the row's own noise ("persistent"), or as noise, and β rises over most of the sweeps ("annealed").
    Without a label, the row's own noise draws the class by its share in the data.

    Statistics of a score:

        free_energy       nats, F of the formulas above, or the bound of it: −log_prob − log Z
        reconstruction    mean squared error of x from the means of the hidden layers
    """

    statistic_names = ("free_energy", "reconstruction")
    training_only = ("chain",)

    base: Tensor  # (2D,) fields of pixels that are independent, and as in the data: β = 0
    offset: Tensor  # (2D,) mean statistics of the data
    prior: Tensor  # (classes,) log p(y)
    chain: Tensor  # (chains, units of the odd layers) bool
    particles: Tensor  # (classes · particles, ⌈units of the odd layers / 8⌉), the bits of each byte from the lowest up
    log_z: Tensor  # (3, classes) log Z by annealing forwards and backwards, and the standard error of the former

    def __init__(self, config: Config, space: ImageSpace) -> None:
        super().__init__()
        _check(config, space)
        self.config = config
        self.depth = len(config.hidden)
        self.conditions = max(1, space.classes)
        deep = "mean-field lower bound; " if self.depth > 1 else ""
        self.spec = Spec(
            family="boltzmann",
            image=dataclasses.replace(space, captions=False),
            steps=Steps("Gibbs sweep", default=config.default_steps, max=max(10_000, config.default_steps)),
            solvers=SOLVERS,
            likelihood=Likelihood(
                kind="estimate",
                dequantisation="none",
                note=f"{deep}log Z by annealed importance sampling over {config.temperatures} temperatures, "
                "an error that all images share",
            ),
        )
        sizes = (2 * space.dims, *config.hidden)
        self.biases = nn.ParameterList(torch.zeros(n) for n in sizes)
        self.weights = nn.ParameterList(0.01 * torch.randn(m, n) for m, n in pairwise(sizes))
        self.top = nn.Parameter(0.5 * torch.randn(self.conditions, sizes[-1])) if space.classes else None
        odd = sum(sizes[1::2])
        self.register_buffer("base", torch.zeros(sizes[0]))
        self.register_buffer("offset", torch.zeros(sizes[0]))
        self.register_buffer("prior", torch.full((self.conditions,), -math.log(self.conditions)))
        self.register_buffer("chain", torch.rand(config.chains // self.conditions * self.conditions, odd) < 0.5)
        anything = torch.rand(self.conditions * config.particles, odd) < 0.5
        self.register_buffer("particles", bytes_of(anything))
        self.register_buffer("log_z", torch.zeros(3, self.conditions, dtype=torch.float64))

    # ---- the machine

    def field(
        self, layer: int, states: States, labels: Tensor, beta: Tensor | float = 1.0, below: Tensor | None = None
    ) -> Tensor:
        """(B, units): what the neighbours and the bias tell a layer. beta: one number or (B, 1). below: what the layer
        below tells it, where that is known already."""
        dtype = states[0].dtype
        field = self.biases[layer].to(dtype)
        if layer > 0:
            field = field + (states[layer - 1] @ self.weights[layer - 1].to(dtype) if below is None else below)
        if layer < self.depth:
            field = field + states[layer + 1] @ self.weights[layer].to(dtype).mT
        elif self.top is not None:
            field = field + self.top.to(dtype)[labels]
        annealed: Tensor = beta * field if layer else (1 - beta) * self.base.to(dtype) + beta * field
        return annealed

    def free_energy(self, states: States, labels: Tensor, beta: float = 1.0) -> Tensor:
        """F (B,) of the even layers' states; what the odd ones' are makes no difference. Nats."""
        dtype = states[0].dtype
        visible = torch.lerp(self.base, self.biases[0], beta).to(dtype)
        energy = -(states[0] @ visible)
        for layer in range(2, self.depth + 1, 2):
            bias = self.biases[layer].to(dtype)
            if layer == self.depth and self.top is not None:
                bias = bias + self.top.to(dtype)[labels]
            energy = energy - beta * (states[layer] * bias).sum(dim=1)
        for layer in range(1, self.depth + 1, 2):
            energy = energy - log_cosh(self.field(layer, states, labels, beta))
        return energy

    def see(self, x: Tensor) -> Tensor:
        """s₀ (B, 2D) of images x (B, C, H, W), or of their pixels (B, D)."""
        return _grey.statistics(x.flatten(1)) - self.offset.to(x.dtype)

    def draw(self, parity: int, states: States, labels: Tensor, beta: Tensor | float, uniforms: Uniforms) -> States:
        """Half a Gibbs sweep: the even layers given the odd ones (parity 0), or the odd given the even (1)."""
        states = list(states)
        for layer in range(parity, self.depth + 1, 2):
            field = self.field(layer, states, labels, beta)
            if layer == 0:
                levels = _grey.draw(field, uniforms(0, field.shape[1] // 2).to(field.dtype))
                states[0] = self.see(levels / _grey.LEVELS)
            else:
                on = uniforms(layer, field.shape[1]).to(field.dtype) < torch.sigmoid(field)
                states[layer] = _bits(on, field.dtype)
        return states

    def sweep(self, states: States, labels: Tensor, beta: Tensor | float, uniforms: Uniforms) -> States:
        """A Gibbs sweep of chains of which the odd layers are known."""
        return self.draw(1, self.draw(0, states, labels, beta, uniforms), labels, beta, uniforms)

    def mean_field(self, states: States, labels: Tensor) -> States:
        """The hidden layers' means given the image: coordinate ascent of the bound; exact for one hidden layer."""
        states = list(states)
        image = states[0] @ self.weights[0].to(states[0].dtype)  # the same in every iteration
        for _ in range(self.config.mean_field if self.depth > 1 else 1):
            for layer in [*range(1, self.depth + 1, 2), *range(2, self.depth + 1, 2)]:
                field = self.field(layer, states, labels, below=image if layer == 1 else None)
                states[layer] = 0.5 * torch.tanh(field / 2)
        return states

    def blank(self, visible: Tensor) -> States:
        """States with s₀ = visible (B, 2D) and hidden layers of zeros, the mean of ±½."""
        return [visible, *(visible.new_zeros(len(visible), n) for n in self.config.hidden)]

    def unpack(self, odd: Tensor, dtype: torch.dtype = torch.float32) -> States:
        """States of which the odd layers' bits are given (B, units of the odd layers)."""
        states = self.blank(torch.zeros(len(odd), len(self.base), dtype=dtype, device=odd.device))
        for k, bits in enumerate(torch.split(odd, list(self.config.hidden[::2]), dim=1)):
            states[1 + 2 * k] = _bits(bits, dtype)
        return states

    def pack(self, states: States) -> Tensor:
        """The inverse of `unpack`."""
        return torch.cat([states[layer] > 0 for layer in range(1, self.depth + 1, 2)], dim=1)

    # ---- objective

    def prepare(self, batches: Iterable[Batch]) -> None:
        """The data's mean statistics, the independent pixels that have them, and the shares of the classes."""
        device, size = self.base.device, len(self.base)
        total, images = torch.zeros(size, dtype=torch.float64, device=device), 0
        labels = torch.ones(self.conditions, device=device)
        for batch in batches:
            total += _grey.statistics(batch.x.flatten(1)).double().sum(dim=0)
            images += len(batch.x)
            given = self._conditions(batch.labels)
            labels += torch.bincount(given[given >= 0], minlength=self.conditions)
        on, level = total.chunk(2)
        share = (on + 0.5) / (images + 1)  # half an image more, mid-grey, and half of a black one
        base = _grey.fit(share, (level + 0.25) / (on + 0.5))
        self.base.copy_(base)
        self.biases[0].copy_(base)
        self.offset.copy_(total / images)
        self.prior.copy_(torch.log(labels / labels.sum()))

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"machine": list(self.parameters())}

    def objective(self, batch: Batch) -> Iterator[tuple[str, Tensor, Mapping[str, Tensor]]]:
        """Contrastive divergence, layer by layer at first where there are several, then of the machine as a whole."""
        joint = math.ceil(self.config.pretraining * batch.steps) if self.depth > 1 else 0  # the step where that begins
        labels = self._conditions(batch.labels)
        known = labels >= 0  # an image without its label teaches nothing
        labels, data = labels.clamp(min=0), self.blank(self.see(batch.x))
        if batch.step < joint:
            gap, name = self._layer_gap(batch.step * self.depth // joint + 1, data, labels)
            loss = (gap * known).sum() / len(known)
            metrics = {name: loss}
        else:
            with torch.no_grad():
                data = self.mean_field(data, labels)
            model, model_labels, weight = self._negative(data, labels, known, burn_in=batch.step == joint)
            energy, fantasy = self.free_energy(data, labels), self.free_energy(model, model_labels)
            loss = (energy * known).sum() / len(known) - (fantasy * weight).sum()
            metrics = {"energy_gap": loss, "reconstruction": self._error(data, batch.x, labels).mean()}
        decay = sum((w.square().sum() for w in self.weights), torch.zeros((), device=loss.device))
        yield "machine", loss + 0.5 * self.config.decay * decay, {k: v.detach() for k, v in metrics.items()}

    @torch.no_grad()
    def _negative(self, data: States, labels: Tensor, known: Tensor, burn_in: bool) -> tuple[States, Tensor, Tensor]:
        """Draws from the machine: states, labels, and the weight of each, as much of a class as in the batch."""

        def uniforms(layer: int, n: int) -> Tensor:
            return torch.rand(len(states[0]), n, device=labels.device)

        if len(self.chain) == 0:
            weight = known / len(known)
            states = [data[0], *(_bits(torch.rand_like(mean) < mean + 0.5, mean.dtype) for mean in data[1:])]
        else:
            each, states = len(self.chain) // self.conditions, self.unpack(self.chain)
            share = torch.bincount(labels[known], minlength=self.conditions) / len(labels)
            labels = torch.arange(len(self.chain), device=labels.device) % self.conditions
            weight = share[labels] / each
        for _ in range(BURN_IN if burn_in and len(self.chain) else self.config.sweeps):
            states = self.sweep(states, labels, 1.0, uniforms)
        if len(self.chain):
            self.chain.copy_(self.pack(states))
        return states, labels, weight

    def _layer_gap(self, layer: int, states: States, labels: Tensor) -> tuple[Tensor, str]:
        """CD-1 of a layer and the one below, (B,), and a name for it. A layer that will have neighbours on both sides
        hears the one it has twice for now (Salakhutdinov and Hinton 2009, §3)."""

        def above(k: int, below: Tensor, times: int = 2) -> Tensor:
            field: Tensor = (1 if k == self.depth else times) * (below @ self.weights[k - 1]) + self.biases[k]
            return field + self.top[labels] if k == self.depth and self.top is not None else field

        def minus_energy(below: Tensor) -> Tensor:
            with torch.no_grad():
                mean = 0.5 * torch.tanh(above(layer, below) / 2)
            value: Tensor = below @ self.biases[layer - 1] + (above(layer, below, times=1) * mean).sum(dim=1)
            return value

        with torch.no_grad():
            below = states[0]
            for k in range(1, layer):
                below = 0.5 * torch.tanh(above(k, below) / 2)
            field = above(layer, below)
            drawn = _bits(torch.rand_like(field) < torch.sigmoid(field), field.dtype)
            back = (1 if layer == 1 else 2) * (drawn @ self.weights[layer - 1].mT) + self.biases[layer - 1]
            if layer == 1:
                again = self.see(_grey.draw(back, torch.rand_like(back[:, ::2])) / _grey.LEVELS)
            else:
                again = _bits(torch.rand_like(back) < torch.sigmoid(back), back.dtype)
        return minus_energy(again) - minus_energy(below), f"layer_{layer}_gap"

    def conclude(self, batches: Iterable[Batch]) -> None:
        """log Z of every class from below and from above, and the particles that samples begin at.

        The chains that come back from β = 1 should begin as draws from the machine: they are the persistent ones (or,
        without such, those that have just arrived there) after as many further sweeps as there are temperatures.
        """
        m, device = self.config.particles, self.device
        labels = torch.arange(self.conditions, device=device).repeat_interleave(m)

        def uniforms(layer: int, n: int) -> Tensor:
            return torch.rand(len(labels), n, device=device)

        def log_f(states: States, beta: float) -> Tensor:
            return -self.free_energy(states, labels, beta)

        def transition(states: States, beta: float) -> States:
            return self.draw(0, self.draw(1, states, labels, beta, uniforms), labels, beta, uniforms)

        betas = torch.linspace(0, 1, self.config.temperatures, dtype=torch.float64).tolist()
        anywhere = self.blank(torch.zeros(len(labels), len(self.base), device=device))
        forward, states = _annealing.anneal(self.draw(0, anywhere, labels, 0.0, uniforms), betas, log_f, transition)
        if len(self.chain):
            chains = torch.arange(m, device=device).repeat(self.conditions) * self.conditions + labels
            states = self.draw(0, self.unpack(self.chain[chains % len(self.chain)]), labels, 1.0, uniforms)
        for _ in range(self.config.temperatures):
            states = transition(states, 1.0)
        self.particles.copy_(bytes_of(self.pack(self.draw(1, states, labels, 1.0, uniforms))))
        backward, _ = _annealing.anneal(states, betas[::-1], log_f, transition)

        base = self.base.double()
        start = _grey.log_partition(base[None]) - base @ self.offset.double() + math.log(2) * sum(self.config.hidden)
        below, stderr = _annealing.log_mean(forward.view(-1, m))
        above, _ = _annealing.log_mean(backward.view(-1, m))
        self.log_z.copy_(torch.stack([start + below, start - above, stderr]))

    # ---- sampler

    def init(self, draws: Sequence[Draw]) -> GibbsRows:
        device, b, m = self.device, len(draws), self.config.particles
        seed = _random.seed_bits([d.seed for d in draws], device)
        sample = torch.tensor([d.sample for d in draws], dtype=torch.int64, device=device)
        odd = sum(self.config.hidden[::2])
        start = _random.uniform(seed, sample, 0, _START, (2 + odd,)).double()
        upto = self.prior.double().exp().cumsum(dim=0)
        drawn = torch.searchsorted(upto / upto[-1], start[:, 0].contiguous()).clamp(max=self.conditions - 1)
        asked = torch.tensor([d.label for d in draws], device=device)
        label = torch.where(asked < 0, drawn, asked) if self.top is not None else torch.zeros_like(asked)
        annealed = torch.tensor([d.solver == "annealed" for d in draws], device=device)
        steps = torch.tensor([d.steps for d in draws], device=device)
        stored = bits_of(self.particles[label * m + (start[:, 1] * m).long()], odd)
        states = self.unpack(torch.where(annealed[:, None], start[:, 2:] < 0.5, stored))
        return GibbsRows(
            tick=torch.zeros(b, dtype=torch.int64, device=device),
            left=steps,
            seed=seed,
            sample=sample,
            label=label,
            rise=torch.where(annealed, 1 / (ANNEALED * steps.double()).clamp(min=1.0), 1.0),
            visible=torch.zeros(b, self.spec.image.dims, dtype=torch.uint8, device=device),
            hidden=tuple(state > 0 for state in states[1:]),
        )

    def step(self, rows: GibbsRows) -> GibbsRows:
        """A sweep. In float64, whose sums decide a draw the same way in batches of any size."""

        def uniforms(layer: int, n: int) -> Tensor:
            return _random.uniform(rows.seed, rows.sample, rows.tick, 1 + layer, (n,))

        states = self.sweep(self._states(rows), rows.label, self._beta(rows), uniforms)
        level = (states[0] + self.offset)[:, self.spec.image.dims :] * _grey.LEVELS
        rows.visible = level.round().to(torch.uint8)
        rows.hidden = tuple(state > 0 for state in states[1:])
        rows.tick, rows.left = rows.tick + 1, rows.left - 1
        return rows

    def image(self, rows: GibbsRows) -> Tensor:
        """The expected image given the first hidden layer."""
        mean = _grey.mean(self.field(0, self._states(rows), rows.label, self._beta(rows)))
        return mean.float().clamp(0, 1).view(-1, *self.spec.image.shape)

    def _states(self, rows: GibbsRows) -> States:
        return [self.see(rows.visible.double() / _grey.LEVELS), *(_bits(on, torch.float64) for on in rows.hidden)]

    def _beta(self, rows: GibbsRows) -> Tensor:
        return ((rows.tick + 1) * rows.rise).clamp(max=1.0)[:, None]

    # ---- density

    def evaluate(self, x: Tensor, labels: Tensor) -> Score:
        """log p(x | y), or log Σ_y p(y) p(x | y); for more than one hidden layer with the bound in the place of each.

        In float64: what is left of terms of thousands of nats decides.
        """
        x, c = x.double(), self.conditions
        y = torch.arange(c, device=x.device).repeat(len(x))
        states = self.mean_field(self.blank(self.see(x.repeat_interleave(c, dim=0))), y)
        evens = torch.cat(states[2::2], dim=1) if self.depth > 1 else x.new_zeros(len(y), 0)
        entropy = -(torch.xlogy(0.5 + evens, 0.5 + evens) + torch.xlogy(0.5 - evens, 0.5 - evens)).sum(dim=1)
        bound = (entropy - self.free_energy(states, y)).view(-1, c)  # (B, classes)
        log_prob = bound - self.log_z[0]
        given = F.one_hot(labels.clamp(min=0), c).double().log() if self.top is not None else torch.zeros_like(bound)
        weight = torch.where(labels[:, None] < 0, self.prior.double(), given)  # log of p(y), or of what is known of y
        posterior = (weight + log_prob).softmax(dim=1)
        error = (_grey.mean(self.field(0, states, y)) - x.repeat_interleave(c, dim=0).flatten(1)).square().mean(dim=1)
        return Score(
            log_prob=(weight + log_prob).logsumexp(dim=1).float(),
            statistics={
                "free_energy": -(weight + bound).logsumexp(dim=1).float(),
                "reconstruction": (posterior * error.view(-1, c)).sum(dim=1).float(),
            },
        )

    def score(self, rows: _protocol.PassRows) -> Score:
        """With the error of log Z, the largest of the classes that may matter: that of annealing forwards, and how far
        it ends from annealing backwards."""
        below, above, stderr = self.log_z
        error = torch.hypot(stderr, above - below).float()
        given = error[rows.labels.clamp(min=0)] if self.top is not None else error.expand(len(rows.labels))
        return dataclasses.replace(super().score(rows), stderr=torch.where(rows.labels < 0, error.max(), given))

    def _error(self, states: States, x: Tensor, labels: Tensor) -> Tensor:
        return (_grey.mean(self.field(0, states, labels)) - x.flatten(1)).square().mean(dim=1)

    def _conditions(self, labels: Tensor) -> Tensor:
        """Labels, -1 where missing; 0 for all where there are no classes."""
        return labels if self.top is not None else torch.zeros_like(labels)


def _bits(on: Tensor, dtype: torch.dtype) -> Tensor:
    """Bits as states ±½."""
    return on.to(dtype) - 0.5


def bytes_of(bits: Tensor) -> Tensor:
    """Bits (B, N) bool, eight in a byte: (B, ⌈N / 8⌉) uint8."""
    filled = F.pad(bits, (0, -bits.shape[1] % 8)).view(len(bits), -1, 8)
    return (filled.long() << torch.arange(8, device=bits.device)).sum(dim=2).to(torch.uint8)


def bits_of(packed: Tensor, n: int) -> Tensor:
    """The inverse of `bytes_of`: (B, n) bool."""
    each = packed[..., None].long() >> torch.arange(8, device=packed.device)
    return (each & 1).flatten(1)[:, :n].bool()


def _check(config: Config, space: ImageSpace) -> None:
    if not 1 <= len(config.hidden) <= 3 or min(config.hidden) < 1:
        raise ValueError(f"hidden: {config.hidden}; one to three layers of at least one unit each")
    for name, least in (("chains", 0), ("sweeps", 1), ("mean_field", 1), ("particles", 2), ("temperatures", 2)):
        if getattr(config, name) < least:
            raise ValueError(f"{name}: {getattr(config, name)}; at least {least}")
    if 0 < config.chains < space.classes:
        raise ValueError(f"chains: {config.chains}; 0, or at least one for each of {space.classes} classes")
    if config.default_steps < 1:
        raise ValueError(f"default_steps: {config.default_steps}; at least 1")
    if not 0 <= config.pretraining < 1:
        raise ValueError(f"pretraining: {config.pretraining} is not in [0, 1)")
    if config.decay < 0:
        raise ValueError(f"decay: {config.decay}; not negative")
    if min(space.shape) < 1:
        raise ValueError(f"space: an image of {space.width}×{space.height}×{space.channels} has no pixel")
