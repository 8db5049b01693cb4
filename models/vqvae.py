"""Vector-quantised variational autoencoder (VQ-VAE; van den Oord et al., arXiv 1711.00937), class-conditional: images
become a few codes, and an autoregressive prior learns the language of the codes.

Two stages, one after the other in one run: first the autoencoder (`models._vq`), then, with that one frozen, the prior
(`models._codes`). A sample is drawn patch by patch from p(codes | label) and shown as the decoder sees it.

    log p(x | label) ≥ log p(codes(x) | label) + log p(x | codes(x))

is what a score returns: one term of the sum over all codes that p(x | label) is, so a bound, and the ELBO of a
posterior that puts all its mass on the codes that the encoder chooses.

What differs from the paper: the prior is a transformer, not a PixelCNN, and starts from the label; the decoder's
likelihood is one of 8-bit pixels; and the codebook as `models._vq` says. A sample shows every pixel's median; the
solver "draw" draws every pixel, which adds noise that is independent given the codes.

    B    rows: chains, images    T    patches of an image    G    codes of a patch    D    width of the prior
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import _codes, _protocol, _random
from models._codes import CodeRows, CodeTransformer
from models._protocol import Batch, Draw, ImageSpace, Likelihood, OnePassDensity, Range, Score, Spec, Steps
from models._vq import DiscreteAutoencoder

PIXELS = 1  # draw of a row's noise, beside the codes'


@dataclass(frozen=True)
class Config:
    """Everything that shapes the networks and the objectives."""

    groups: int = 1  # G, codes of a patch of 4×4 pixels
    codes: int = 512  # K, vectors in each codebook
    dims: int = 16  # of a vector
    width: int = 48  # channels of the autoencoder at a quarter of the image's resolution
    blocks: int = 2  # residual blocks there, in the encoder and in the decoder
    decay: float = 0.99  # γ of the codebook's moving averages
    commitment: float = 0.25  # β
    scale: float = -1.5  # log of the scale that the pixels' means learn at, where black is −1 and white is 1
    first_stage: float = 0.4  # part of the training that the autoencoder has
    unquantised: float = 0.1  # part of that in which the decoder sees no codes yet
    prior_width: int = 96  # D
    prior_heads: int = 3
    prior_layers: int = 4
    label_dropout: float = 0.1  # how often training hides the label, so that p(x) is learnt next to p(x | label)


@dataclass
class VQRows(CodeRows):
    """Images of which the first patches have been drawn."""

    seed: Tensor  # (B,)
    sample: Tensor  # (B,)
    label: Tensor  # (B,)
    drawn: Tensor  # (B,) bool: the image is a draw from the pixels' likelihood, not its median


class Model(_protocol.Model, OnePassDensity, _protocol.Autoencoder):
    """Samples in T ticks with a cache; scores in one pass. Statistics of a score: the two terms of its negative, and
    how far the encoder's outputs are from the vectors that stand for them (mean square)."""

    statistic_names = ("codes_nats", "reconstruction_nats", "distance")

    def __init__(self, config: Config, space: ImageSpace) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.autoencoder = DiscreteAutoencoder(
            space,
            config.width,
            config.blocks,
            config.groups,
            config.codes,
            config.dims,
            config.decay,
            config.commitment,
            config.scale,
        )
        tokens = self.autoencoder.tokens
        self.prior = CodeTransformer(
            config.groups, config.codes, tokens, 1, config.prior_width, config.prior_heads, config.prior_layers
        )
        # What the first code is drawn from; the last row is for images without a label.
        self.label = nn.Parameter(0.5 * torch.randn(space.classes + 1, config.prior_width))
        self.spec = Spec(
            family="vqvae",
            image=replace(space, captions=False),
            steps=Steps(unit="token", min=tokens, default=tokens, max=tokens),
            solvers=("median", "draw"),
            likelihood=Likelihood(kind="bound", dequantisation="none", note="the encoder's codes alone"),
            temperature=Range(min=0.1, default=1.0, max=2.0),
            top_k=config.codes,
        )

    def prompt(self, labels: Tensor) -> Tensor:
        """(B, 1, D) for labels (B,), -1 for none."""
        return self.label[torch.where(labels < 0, len(self.label) - 1, labels)][:, None]

    def reconstruct(self, x: Tensor, labels: Tensor) -> Tensor:
        """Every pixel's median given the codes; they do not depend on labels."""
        return self.autoencoder.median(self.autoencoder.decode(self.autoencoder.encode(x)))

    # objective

    def prepare(self, batches: Iterable[Batch]) -> None:
        self.autoencoder.prepare(next(iter(batches)).x)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"autoencoder": list(self.autoencoder.parameters()), "prior": [*self.prior.parameters(), self.label]}

    def objective(self, batch: Batch) -> Iterator[tuple[str, Tensor, Mapping[str, Tensor]]]:
        """First the autoencoder's loss alone, then the prior's alone: nats per code."""
        first = self.config.first_stage * batch.steps
        if batch.step < first:
            quantised = batch.step >= self.config.unquantised * first
            yield "autoencoder", *self.autoencoder.loss(batch.x, quantised)
            return
        with torch.no_grad():
            codes = self.autoencoder.encode(batch.x)
        hidden = torch.rand(batch.labels.shape, device=codes.device) < self.config.label_dropout
        labels = batch.labels.masked_fill(hidden, _protocol.UNLABELLED)
        logits = self.prior.logits(self.prompt(labels), codes)
        yield "prior", F.cross_entropy(logits.flatten(0, 2), codes.flatten()), {}

    # sampler

    def init(self, draws: Sequence[Draw]) -> VQRows:
        device = self.device
        label = torch.tensor([d.label for d in draws], device=device)
        return VQRows(
            **_codes.begin(draws, self.autoencoder.tokens, self.config.groups, self.config.codes, device),
            cache=self.prior.begin(self.prompt(label)[:, 1:]),
            seed=_random.seed_bits([d.seed for d in draws], device),
            sample=torch.tensor([d.sample for d in draws], device=device),
            label=label,
            drawn=torch.tensor([d.solver == "draw" for d in draws], device=device),
        )

    def step(self, rows: VQRows) -> VQRows:
        """Draw the next patch of every image, wherever it is."""
        outputs = self.prior.step(rows, self.prompt(rows.label)[:, 0], rows.cache)
        _codes.advance(rows, lambda drawn: self.prior.next(outputs, drawn))
        return rows

    def image(self, rows: VQRows) -> Tensor:
        """What the codes so far are decoded to; grey where none has been drawn."""
        params = self.autoencoder.params(rows.codes, rows.known)
        x = self.autoencoder.median(params)
        if rows.drawn.any():
            shape = (self.autoencoder.likelihood.uniforms, *x.shape[2:])
            uniforms = _random.uniform(rows.seed, rows.sample, 0, PIXELS, shape)
            x = torch.where(rows.drawn[:, None, None, None], self.autoencoder.likelihood.draw(params, uniforms), x)
        return self.autoencoder.veiled(x, rows.known)

    # density

    def evaluate(self, x: Tensor, labels: Tensor) -> Score:
        codes, distance = self.autoencoder.nearest(x)
        log_codes = self.prior.log_prob(self.prompt(labels), codes)
        log_pixels = self.autoencoder.log_prob(x, codes)
        return Score(
            log_prob=log_codes + log_pixels,
            statistics={"codes_nats": -log_codes, "reconstruction_nats": -log_pixels, "distance": distance},
        )


def _check(config: Config) -> None:
    """Raises `ValueError` that names the field, its value and what would be right."""
    if not 0 < config.first_stage < 1:
        raise ValueError(f"first_stage: {config.first_stage} is not between 0 and 1; both stages need their steps")
    if not 0 <= config.unquantised < 1:
        raise ValueError(f"unquantised: {config.unquantised} is not in [0, 1)")
    if not 0 <= config.label_dropout < 1:
        raise ValueError(f"label_dropout: {config.label_dropout} is not in [0, 1)")
    if config.prior_layers < 1:
        raise ValueError(f"prior_layers: {config.prior_layers}; at least 1")
    if config.prior_width < 1 or config.prior_heads < 1 or config.prior_width % config.prior_heads:
        raise ValueError(f"prior_width: {config.prior_width} is not a multiple of prior_heads ({config.prior_heads})")
