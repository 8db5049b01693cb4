"""DALL·E (Ramesh et al., arXiv 2102.12092): images from captions. One transformer models a caption's tokens and then an
image's codes as one sequence.

Two stages, one after the other in one run: first a discrete autoencoder (`models._vq`), which makes an image of a few
codes; then, with that one frozen, the transformer (`models._codes`) over

    begin, text_1 … text_L, patch_1 … patch_T

where text is the caption in byte-pair encoding (`models._captions`), padded to L tokens. Its loss is that of the paper,
one part text and seven parts image. A sample is drawn patch by patch after the caption, and decoded.

    log p(x) ≥ log p(codes(x) | no caption) + log p(x | codes(x))

is what a score returns: one term of the sum over all codes that p(x) is, so a bound.

What differs from the paper: the autoencoder is vector-quantised (arXiv 1711.00937), not relaxed by a Gumbel-softmax;
its likelihood is a logistic of the 8-bit levels, in place of a logit-Laplace; attention is full, since the sequences
are short; some captions are hidden in training, so that a sample can be guided away from what has no caption (arXiv
2207.12598, on logits), where the paper draws 512 images and ranks them.

    B    rows: chains, images      L    tokens of a caption      D    width
    T    patches of an image       G    codes of a patch
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import _codes, _protocol
from models._captions import PADDING, Captions
from models._codes import CodeRows, CodeTransformer
from models._protocol import Batch, Draw, ImageSpace, Likelihood, OnePassDensity, Range, Score, Spec, Steps
from models._transformer import Cache
from models._vq import DiscreteAutoencoder

MAX_GUIDANCE = 10.0


@dataclass(frozen=True)
class Config:
    """Everything that shapes the networks and the objectives."""

    groups: int = 2  # G, codes of a patch of 4×4 pixels
    codes: int = 256  # K, vectors in each codebook
    dims: int = 8  # of a vector
    width: int = 48  # channels of the autoencoder at a quarter of the image's resolution
    blocks: int = 2  # residual blocks there, in the encoder and in the decoder
    decay: float = 0.99  # γ of the codebook's moving averages
    commitment: float = 0.25  # β
    scale: float = -1.5  # log of the scale that the pixels' means learn at, where black is −1 and white is 1
    first_stage: float = 0.4  # part of the training that the autoencoder has
    unquantised: float = 0.1  # part of that in which the decoder sees no codes yet
    vocabulary: int = 352  # of the captions' tokens
    caption_tokens: int = 16  # L
    text_weight: float = 1 / 8  # of the text's loss; the image's has the rest
    caption_dropout: float = 0.1  # how often training hides the caption
    guidance_scale: float = 2.0  # of a sample, where a request does not say
    transformer_width: int = 96  # D
    heads: int = 3
    layers: int = 4


@dataclass
class CaptionedRows(CodeRows):
    """Images of which the first patches have been drawn, each after its caption and, for guidance, after none."""

    last: Tensor  # (B,) the caption's last token, which the first step is given
    guidance: Tensor  # (B, 1); 1 where there is no caption
    uncaptioned: Cache


class Model(_protocol.Model, OnePassDensity, _protocol.Autoencoder):
    """Samples in T ticks with a cache; scores in one pass. Statistics of a score: the two terms of its negative, and
    how far the encoder's outputs are from the vectors that stand for them (mean square)."""

    statistic_names = ("codes_nats", "reconstruction_nats", "distance")

    def __init__(self, config: Config, space: ImageSpace) -> None:
        super().__init__()
        _check(config, space)
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
        tokens, d, length = self.autoencoder.tokens, config.transformer_width, config.caption_tokens
        self.captions = Captions(config.vocabulary, length)
        self.transformer = CodeTransformer(
            config.groups, config.codes, tokens, 1 + length, d, config.heads, config.layers
        )
        self.begin = nn.Parameter(0.5 * torch.randn(d))
        self.text = nn.Parameter(0.5 * torch.randn(config.vocabulary, d))
        self.text_head = nn.Linear(d, config.vocabulary)
        self.spec = Spec(
            family="dalle",
            image=dataclasses.replace(space, labels=()),
            steps=Steps(unit="token", min=tokens, default=tokens, max=tokens),
            likelihood=Likelihood(
                kind="bound", dequantisation="none", note="without a caption; the encoder's codes alone"
            ),
            guidance_scale=Range(min=0.0, default=config.guidance_scale, max=MAX_GUIDANCE),
            temperature=Range(min=0.1, default=1.0, max=2.0),
            top_k=config.codes,
        )

    def prompt(self, text: Tensor) -> Tensor:
        """(B, 1 + L, D) for a caption's tokens (B, L)."""
        return torch.cat([self.begin.expand(len(text), 1, -1), self.text[text]], dim=1)

    def reconstruct(self, x: Tensor, labels: Tensor) -> Tensor:
        """Every pixel's median given the codes."""
        return self.autoencoder.median(self.autoencoder.decode(self.autoencoder.encode(x)))

    # objective

    def prepare(self, batches: Iterable[Batch]) -> None:
        """The captions' vocabulary from all of them, the codebook from the first images."""
        captions: list[str] = []
        for batch in batches:
            if not captions:
                self.autoencoder.prepare(batch.x)
            captions += batch.captions
        self.captions.learn(captions)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        autoencoder = list(self.autoencoder.parameters())
        language = [*self.transformer.parameters(), self.begin, self.text, *self.text_head.parameters()]
        return {"autoencoder": autoencoder, "transformer": language}

    def objective(self, batch: Batch) -> Iterator[tuple[str, Tensor, Mapping[str, Tensor]]]:
        """First the autoencoder's loss alone, then the transformer's alone: nats per token."""
        first = self.config.first_stage * batch.steps
        if batch.step < first:
            quantised = batch.step >= self.config.unquantised * first
            yield "autoencoder", *self.autoencoder.loss(batch.x, quantised)
            return
        with torch.no_grad():
            codes = self.autoencoder.encode(batch.x)
        hidden = (torch.rand(len(codes)) < self.config.caption_dropout).tolist()
        text = self.captions.encode([None if h else c for h, c in zip(hidden, batch.captions, strict=True)])
        outputs, length = self.transformer(self.prompt(text), codes), self.config.caption_tokens
        image = F.cross_entropy(self.transformer.tell(outputs[:, length:], codes).flatten(0, 2), codes.flatten())
        each = F.cross_entropy(
            self.text_head(outputs[:, :length]).float().flatten(0, 1), text.flatten(), reduction="none"
        )
        said = text.flatten() != PADDING
        words = (each * said).sum() / said.sum().clamp(min=1)
        metrics = {"image_nats": image.detach(), "text_nats": words.detach()}
        yield "transformer", self.config.text_weight * words + (1 - self.config.text_weight) * image, metrics

    # sampler

    def init(self, draws: Sequence[Draw]) -> CaptionedRows:
        """Takes in the captions: what remains are the steps of the codes."""
        device = self.device
        text = self.captions.encode([d.prompt for d in draws])
        told = [d.guidance_scale if d.prompt is not None else 1.0 for d in draws]
        blank = self.transformer.begin(self.prompt(self.captions.encode([None]))[:, :-1])
        return CaptionedRows(
            **_codes.begin(draws, self.autoencoder.tokens, self.config.groups, self.config.codes, device),
            cache=self.transformer.begin(self.prompt(text)[:, :-1]),
            last=text[:, -1],
            guidance=torch.tensor(told, dtype=torch.float32, device=device)[:, None],
            uncaptioned=tuple(part.repeat(len(draws), *(1,) * (part.dim() - 1)) for part in blank),
        )

    def step(self, rows: CaptionedRows) -> CaptionedRows:
        """Draw the next patch of every image, wherever it is."""
        _codes.advance(rows, self.logits(rows))
        return rows

    def logits(self, rows: CaptionedRows) -> Callable[[Tensor], Tensor]:
        """What `_codes.advance` draws the next patch from: without a caption + guidance · (with it − without it).

        Writes into the caches. The second pass is left out where no row is guided.
        """
        told = self.transformer.step(rows, self.text[rows.last], rows.cache)
        if (rows.guidance == 1).all():
            return lambda drawn: self.transformer.next(told, drawn)
        nothing = self.text[PADDING].expand(len(rows.last), -1)
        untold = self.transformer.step(rows, nothing, rows.uncaptioned)

        def guided(drawn: Tensor) -> Tensor:
            conditional, unconditional = self.transformer.next(told, drawn), self.transformer.next(untold, drawn)
            beyond = torch.lerp(unconditional, conditional, rows.guidance)
            return torch.where(rows.guidance == 1, conditional, beyond)

        return guided

    def image(self, rows: CaptionedRows) -> Tensor:
        """What the codes so far are decoded to; grey where none has been drawn."""
        x = self.autoencoder.median(self.autoencoder.params(rows.codes, rows.known))
        return self.autoencoder.veiled(x, rows.known)

    # density

    def evaluate(self, x: Tensor, labels: Tensor) -> Score:
        codes, distance = self.autoencoder.nearest(x)
        blank = self.prompt(self.captions.encode([None])).expand(len(x), -1, -1)
        log_codes = self.transformer.log_prob(blank, codes)
        log_pixels = self.autoencoder.log_prob(x, codes)
        return Score(
            log_prob=log_codes + log_pixels,
            statistics={"codes_nats": -log_codes, "reconstruction_nats": -log_pixels, "distance": distance},
        )


def _check(config: Config, space: ImageSpace) -> None:
    """Raises `ValueError` that names the field, its value and what would be right."""
    if not space.captions:
        raise ValueError("space: images without captions; this family learns from captions")
    if not 0 < config.first_stage < 1:
        raise ValueError(f"first_stage: {config.first_stage} is not between 0 and 1; both stages need their steps")
    if not 0 <= config.unquantised < 1:
        raise ValueError(f"unquantised: {config.unquantised} is not in [0, 1)")
    if not 0 <= config.guidance_scale <= MAX_GUIDANCE:
        raise ValueError(f"guidance_scale: {config.guidance_scale} is not in [0, {MAX_GUIDANCE:g}]")
    for name in ("text_weight", "caption_dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name}: {getattr(config, name)} is not in [0, 1)")
