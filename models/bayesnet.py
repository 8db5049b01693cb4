"""Bayesian networks over pixels: the Chow–Liu tree (Chow and Liu 1968, "Approximating discrete probability
distributions with dependence trees"), the same with the class as a further parent of every pixel (tree-augmented naive
Bayes, Friedman, Geiger and Goldszmidt 1997), and naive Bayes, where the class is the only parent.

Of all trees the maximum spanning tree by mutual information (given the class, where it is a parent) has the greatest
likelihood, and its tables are frequencies: learning is counting. Inference is exact as well: messages along the tree
give the probability of an image, the class behind it, and the rest of an image of which some pixels are seen.

What differs from the papers: pixels have too many levels for tables, so the network is one of K bins of grey, edges of
bins lying where they hold about as many pixels each, and a level inside its bin depends on the pixel and the bin alone:

    p(x | y) = Π_i p(b_i | b_parent(i), y) p(x_i | b_i)

which is a probability of the 8-bit image: over all images it sums to one. Frequencies are smoothed by Dirichlet priors
about coarser ones, as in tree-augmented naive Bayes: of a bin given parents about the bin's own (given the class), that
about uniform; of a level in a bin about all pixels' together, that about uniform.

    variable        meaning
    D, K, C         pixels (of all channels), bins, classes (1 where the class is no parent)
    levels          (B, D) int64: the image, 0 … levels − 1
    bins            (B, D) int64: b
    tables          (C, D, P, K) log p(b_i = k | b_parent(i) = p, y); P = K, or 1 without a tree
    within          (D, levels) log p(x_i = level | its bin)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import _mixtures, _protocol, _random, _trees
from models._pixels import TILE, tiles
from models._protocol import Batch, Draw, ImageSpace, Likelihood, OnePassDensity, Range, Rows, Score, Spec, Steps
from models._trees import Tree

CLASS, BIN, LEVEL = 0, 1, 2  # draws of a sample's noise
ROWS = 1024  # images whose tables are counted together


@dataclass(frozen=True)
class Config:
    """The network's structure, and how it is smoothed."""

    tree: bool = True  # False: no pixel has another for its parent
    by_class: bool = False  # the class is a parent of every pixel
    bins: int = 16  # K, grey values that the network tells apart
    levels: int = 256  # of a pixel; fewer: of the image rounded to so many, 2 for one that is black or white
    smoothing: float = 5.0  # images that a prior counts for


@dataclass
class NetworkRows(Rows):
    """Rows of a sample: one pass draws every pixel, parents first."""

    seed: Tensor  # (B,)
    sample: Tensor  # (B,)
    label: Tensor  # (B,)
    temperature: Tensor  # (B,)
    x: Tensor  # (B, C, H, W)


class Model(_protocol.Model, OnePassDensity, _protocol.Localiser):
    """A Bayesian network. Learnt in `prepare`; sampled, and scored exactly, in one pass.

    A sample is drawn layer by layer of the tree, but in one step: a layer is a look into tables, less work than joining
    and leaving a batch between layers would be.

    Statistics of a score:

        entropy         nats, Σ_i entropy of p(x_i | b_parent(i), y), averaged over p(y | x): -log_prob, as expected
        worst_pixel     nats, largest surprise of a pixel, −log p(x_i | b_parent(i), y) less its entropy, averaged alike
        worst_tile      nats, largest sum of surprises in a tile of TILE × TILE pixels
        class_entropy   by class: nats, of p(y | x)

    The terms of pixels are log p(x_i | those before), in the order of the tree's layers.
    """

    has_pixel_terms = True

    bin_of: Tensor  # (levels,) int64
    parent: Tensor  # (D,) int64

    def __init__(self, config: Config, space: ImageSpace) -> None:
        super().__init__()
        _check(config, space)
        self.config = config
        kept = space.labels if config.by_class else ()
        self.spec = Spec(
            family="bayesnet",
            image=dataclasses.replace(space, labels=kept, captions=False),
            steps=Steps(unit="pass"),
            likelihood=Likelihood(
                kind="exact",
                dequantisation="none",
                note="" if config.levels == 256 else f"of the image rounded to {config.levels} levels",
                heatmap_evaluations=1,
            ),
            temperature=Range(min=0.1, default=1.0, max=2.0),
        )
        self.statistic_names = (
            "entropy",
            "worst_pixel",
            "worst_tile",
            *(("class_entropy",) if config.by_class else ()),
        )
        classes, dims, k = max(1, len(kept)), space.dims, config.bins
        self.register_buffer("bin_of", torch.arange(config.levels) * k // config.levels)
        self.register_buffer("parent", torch.arange(dims) - 1 if config.tree else torch.full((dims,), -1))
        self.log_prior = _kept(classes)
        self.table_logits = _kept(classes, dims, k if config.tree else 1, k)
        self.level_logits = _kept(dims, config.levels)

    # What the parameters stand for: normalised in float64, so that it sums to one in whatever they were stored.

    @property
    def tree(self) -> Tree:
        return Tree(self.parent, self.table_logits.double().log_softmax(dim=-1))

    @property
    def within(self) -> Tensor:
        """(D, levels)"""
        logits = self.level_logits.double()
        mass = logits.new_zeros(len(logits), self.config.bins).index_add_(1, self.bin_of, logits.exp())
        return logits - mass.log()[:, self.bin_of]

    def class_prior(self, labels: Tensor) -> Tensor:
        """(B, C) log p(y | label): what is known of the class before the image is seen."""
        return _mixtures.given(self.log_prior.double().log_softmax(dim=0), labels)

    # learning

    def prepare(self, batches: Iterable[Batch]) -> None:
        """All of the learning. The images are kept, a byte a pixel. Raises `ValueError` for images without a label
        where the class is a parent."""
        pixels, classes = [], []
        for batch in batches:
            pixels.append(self._levels(batch.x).to(torch.uint8))
            classes.append(batch.labels if self.config.by_class else torch.zeros_like(batch.labels))
        levels, labels = torch.cat(pixels), torch.cat(classes)
        if bool((labels < 0).any()):
            raise ValueError("by_class: some images have no label, and the class is a parent of every pixel")
        self.bin_of.copy_(equal_bins(torch.bincount(levels.flatten(), minlength=self.config.levels), self.config.bins))
        bins = self.bin_of.to(torch.uint8)[levels.long()]
        if self.config.tree:
            self.parent.copy_(_trees.chow_liu(self._information(bins, labels)))
        prior = torch.bincount(labels, minlength=len(self.log_prior)).double()
        self.log_prior.copy_((prior + self.config.smoothing / len(prior)).log())
        for c in range(len(self.log_prior)):
            self.table_logits[c] = self._frequencies(bins[labels == c]).log()
        self.level_logits.copy_(self._level_frequencies(levels).log())

    def _information(self, bins: Tensor, labels: Tensor) -> Tensor:
        """(D, D) mutual information of pairs of pixels given the class, nats."""
        parts = [bins[labels == c] for c in range(len(self.log_prior))]
        each = [_trees.mutual_information(part, self.config.bins) * len(part) for part in parts if len(part)]
        return torch.stack(each).sum(dim=0) / len(bins)

    def _frequencies(self, bins: Tensor) -> Tensor:
        """(D, P, K) smoothed frequencies of bins given the parent's, in images (N, D) of one class."""
        (_, dims, p, k), strength = self.table_logits.shape, self.config.smoothing
        counts = torch.zeros(dims * p * k, dtype=torch.int64, device=bins.device)
        place = torch.arange(dims, device=bins.device) * p * k
        for part in torch.split(bins.long(), ROWS):
            above = part[:, self.parent.clamp(min=0)] * (self.parent >= 0)
            counts += torch.bincount((place + above * k + part).flatten(), minlength=len(counts))
        joint = counts.view(dims, p, k).double()
        alone = _smoothed(joint.sum(dim=1, keepdim=True), joint.new_full((k,), 1 / k), strength)
        given = _smoothed(joint, alone, strength)
        return torch.where((self.parent >= 0)[:, None, None], given, alone)

    def _level_frequencies(self, levels: Tensor) -> Tensor:
        """(D, levels) smoothed frequencies of levels in their bins, in images (N, D)."""
        dims, size = self.level_logits.shape
        place = torch.arange(dims, device=levels.device) * size
        counts = sum(
            torch.bincount((place + part.long()).flatten(), minlength=dims * size) for part in torch.split(levels, ROWS)
        )
        joint = torch.as_tensor(counts).view(dims, size).double()
        member = F.one_hot(self.bin_of, self.config.bins).double()  # (levels, K)

        def in_bins(counts: Tensor, prior: Tensor) -> Tensor:
            total = counts @ member + self.config.smoothing
            return (counts + self.config.smoothing * prior) / total[..., self.bin_of]

        everywhere = in_bins(joint.sum(dim=0), (1 / member.sum(dim=0))[self.bin_of])
        return in_bins(joint, everywhere)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """None: no gradient is taken."""
        return {}

    def objective(self, batch: Batch) -> Iterator[tuple[str, Tensor, Mapping[str, Tensor]]]:
        yield from ()

    # sampler

    def init(self, draws: Sequence[Draw]) -> NetworkRows:
        device, b = self.device, len(draws)
        return NetworkRows(
            tick=torch.zeros(b, dtype=torch.int64, device=device),
            left=torch.ones(b, dtype=torch.int64, device=device),
            seed=_random.seed_bits([d.seed for d in draws], device),
            sample=torch.tensor([d.sample for d in draws], dtype=torch.int64, device=device),
            label=torch.tensor([d.label for d in draws], dtype=torch.int64, device=device),
            temperature=torch.tensor([d.temperature for d in draws], dtype=torch.float64, device=device),
            x=torch.full((b, *self.spec.image.shape), 0.5, device=device),
        )

    def step(self, rows: NetworkRows) -> NetworkRows:
        """The class by its prior where it was not asked for, then every pixel given its parents. The temperature
        divides the logits of the tables; levels inside a bin are drawn as they are."""
        rows.x = self._draw(rows, self.class_prior(rows.label), None)
        rows.tick, rows.left = rows.tick + 1, rows.left - 1
        return rows

    def image(self, rows: NetworkRows) -> Tensor:
        return rows.x

    def _draw(self, rows: NetworkRows, class_logits: Tensor, inward: Tensor | None) -> Tensor:
        """(B, C, H, W): a class by its logits (B, C), bins given that and what is known below them, inward
        (B, C, D, K), then levels inside them."""
        (b, dims), tree = (len(rows.tick), self.spec.image.dims), self.tree
        label = _mixtures.choose(class_logits, self._uniforms(rows, CLASS, 1)[:, 0])
        chances = self._uniforms(rows, BIN, dims)

        def pick(logits: Tensor, nodes: Tensor) -> Tensor:
            return _mixtures.choose(logits / rows.temperature[:, None, None], chances[:, nodes])

        known = chances.new_zeros(b, dims, self.config.bins) if inward is None else inward[torch.arange(b), label]
        bins = tree.descend(known, label, pick)
        # The distribution functions of a pixel's bins, one after the other: that of bin b climbs from b to b + 1.
        upto = self.within.exp().cumsum(dim=1)  # (D, levels)
        at = bins + self._uniforms(rows, LEVEL, dims)
        return self._image(torch.searchsorted(upto, at.mT.contiguous(), right=True).mT)

    def _uniforms(self, rows: NetworkRows, draw: int, n: int) -> Tensor:
        return _random.uniform(rows.seed, rows.sample, 0, draw, (n,)).double()

    # density

    def evaluate(self, x: Tensor, labels: Tensor) -> Score:
        tree, prior = self.tree, self.class_prior(labels)
        each, entropies = self._nodes(x)
        order = torch.cat(tree.layers)
        terms = torch.empty_like(each[:, 0])
        terms[:, order] = _mixtures.chain_rule(prior, each[:, :, order])
        posterior = (prior + each.sum(dim=2)).softmax(dim=1)
        surprise = self._by_pixel(posterior, -each - entropies)
        statistics = {
            "entropy": (posterior * entropies.sum(dim=2)).sum(dim=1),
            "worst_pixel": surprise.amax(dim=(1, 2)),
            "worst_tile": tiles(surprise, TILE).amax(dim=(1, 2)),
            "class_entropy": torch.special.entr(posterior).sum(dim=1),
        }
        return Score(
            log_prob=terms.sum(dim=1).float(),
            per_pixel=terms.view(x.shape).sum(dim=1).float(),
            statistics={name: statistics[name].float() for name in self.statistic_names},
        )

    def surprise(self, x: Tensor, labels: Tensor) -> Tensor:
        """−log p(x_i | parent) − entropy of p(· | parent), nats, in the mean over classes by their posterior."""
        each, entropies = self._nodes(x)
        posterior = (self.class_prior(labels) + each.sum(dim=2)).softmax(dim=1)
        return self._by_pixel(posterior, -each - entropies).float()

    def _nodes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, D) nats each: log p(x_i | b_parent(i), y) of every pixel and class, and the entropy of that."""
        levels, tree, within = self._levels(x), self.tree, self.within
        bins, pixel = self.bin_of[levels], torch.arange(levels.shape[1], device=x.device)
        each = tree.terms(bins) + within[pixel, levels][:, None]
        return each, tree.by_parent(self._entropies(tree, within), bins)

    def _by_pixel(self, posterior: Tensor, values: Tensor) -> Tensor:
        """(B, H, W): of values (B, C, D) the mean over classes (B, C), summed over channels."""
        c, h, w = self.spec.image.shape
        return torch.einsum("bc,bcd->bd", posterior, values).view(-1, c, h, w).sum(dim=1)

    def _entropies(self, tree: Tree, within: Tensor) -> Tensor:
        """(C, D, P) entropy of a pixel's level given its parent's bin, nats."""
        p = within.exp()
        inside = -p.new_zeros(len(p), self.config.bins).index_add_(1, self.bin_of, p * within)  # (D, K)
        return (tree.tables.exp() * (inside[:, None] - tree.tables)).sum(dim=-1)

    # questions about images of which some pixels are seen: observed is a boolean mask that broadcasts to x (B, C, H, W)

    def class_posterior(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        """(B, C) p(y | the observed pixels of x); all of them where there is no mask. float64."""
        seen = torch.ones_like(x, dtype=torch.bool) if observed is None else observed
        total = self.tree.collect(self._evidence(x, seen), torch.logsumexp).total
        return (self.class_prior(_protocol.unlabelled(x)) + total).softmax(dim=1)

    def complete(self, x: Tensor, observed: Tensor, draws: Sequence[Draw]) -> Tensor:
        """(B, C, H, W): the observed pixels of x, and the others drawn from their posterior given those, and given the
        draw's label where it has one. A row for each draw; exact at temperature 1."""
        rows = self.init(draws)
        messages = self.tree.collect(self._evidence(x, observed), torch.logsumexp)
        return torch.where(
            observed, x, self._draw(rows, self.class_prior(rows.label) + messages.total, messages.inward)
        )

    def marginals(self, x: Tensor, observed: Tensor, labels: Tensor) -> Tensor:
        """(B, C, H, W, levels) p(x_i = level | the observed pixels of x, label), labels (B,) or -1. float64"""
        tree, levels = self.tree, self._levels(x)
        messages = tree.collect(self._evidence(x, observed), torch.logsumexp)
        posterior = (self.class_prior(labels) + messages.total).softmax(dim=1)
        bins = (posterior[:, :, None, None] * tree.marginals(messages)).sum(dim=1)  # (B, D, K)
        unseen = bins[:, :, self.bin_of] * self.within.exp()
        seen = F.one_hot(levels, self.config.levels).double()
        mask = observed.expand(x.shape).flatten(1)[:, :, None]
        return torch.where(mask, seen, unseen).view(*x.shape, -1)

    def most_likely(self, x: Tensor, observed: Tensor, labels: Tensor) -> Tensor:
        """(B, C, H, W): of all images with the observed pixels of x, the one that is likeliest together with its class,
        or with the label (B,) where that is not -1."""
        member = F.one_hot(self.bin_of, self.config.bins).mT.bool()  # (K, levels)
        best, level = self.within[:, None].masked_fill(~member, -torch.inf).max(dim=2)  # (D, K) each
        tree = self.tree
        messages = tree.collect(self._evidence(x, observed, best), torch.amax)
        label = (self.class_prior(labels) + messages.total).argmax(dim=1)
        inward = messages.inward[torch.arange(len(x)), label]
        bins = tree.descend(inward, label, lambda logits, nodes: logits.argmax(dim=-1))
        pixel = torch.arange(bins.shape[1], device=x.device)
        return torch.where(observed, x, self._image(level[pixel, bins]))

    def _evidence(self, x: Tensor, observed: Tensor, unseen: Tensor | None = None) -> Tensor:
        """(B, D, K) nats: of an observed pixel, its level's in its own bin; of another 0, or unseen (D, K)."""
        levels = self._levels(x)
        pixel = torch.arange(levels.shape[1], device=x.device)
        inside = self.within[pixel, levels][:, :, None]
        own = F.one_hot(self.bin_of[levels], self.config.bins).bool()
        seen = torch.where(own, inside, -torch.inf)
        mask = observed.expand(x.shape).flatten(1)[:, :, None]
        return torch.where(mask, seen, torch.zeros_like(seen) if unseen is None else unseen)

    # levels

    def _levels(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> (B, D) int64"""
        return (x * (self.config.levels - 1)).round().long().flatten(1)

    def _image(self, levels: Tensor) -> Tensor:
        """(B, D) -> (B, C, H, W) on the grid k / 255"""
        grid = (levels * (255 / (self.config.levels - 1))).round().float()
        return (grid / 255).view(-1, *self.spec.image.shape)


def _kept(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape), requires_grad=False)


def equal_bins(counts: Tensor, bins: int) -> Tensor:
    """(levels,) the bin of each level: levels next to each other, that hold about an equal share of what is left of the
    counts (levels,) where the bin begins. A level that is frequent alone is a bin of its own."""
    found, bin, held = torch.zeros(len(counts), dtype=torch.int64), 0, 0
    values = counts.tolist()
    left = sum(values)
    for level, count in enumerate(values):
        full = held > 0 and 2 * held + count > 2 * left / (bins - bin)  # nearer to its share without this level
        if level > 0 and bin < bins - 1 and (full or len(values) - level < bins - bin):
            left, held, bin = left - held, 0, bin + 1
        found[level] = bin
        held += count
    return found


def _smoothed(counts: Tensor, prior: Tensor, strength: float) -> Tensor:
    """Frequencies over the last dim after `strength` further counts that are spread as the prior."""
    return (counts + strength * prior) / (counts.sum(dim=-1, keepdim=True) + strength)


def _check(config: Config, space: ImageSpace) -> None:
    if not 2 <= config.levels <= 256:
        raise ValueError(f"levels: {config.levels} is not in 2 … 256, the grey levels that an 8-bit image can have")
    if not 2 <= config.bins <= config.levels:
        raise ValueError(f"bins: {config.bins} is not in 2 … {config.levels}, the levels of a pixel")
    if not config.smoothing > 0:
        raise ValueError(f"smoothing: {config.smoothing}; above 0, so that nothing is impossible")
    if config.by_class and not space.labels:
        raise ValueError("by_class: True, but the images have no labels")
    if min(space.shape) < 1:
        raise ValueError(f"space: an image of {space.width}×{space.height}×{space.channels} has no pixel")
