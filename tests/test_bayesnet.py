"""Bayesian networks: sums to one, exact inference against enumeration, the tree that Chow and Liu promise."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from models import _trees
from models._protocol import Batch, Draw, ImageSpace, Score, unlabelled
from models._trees import Tree, chow_liu, layers, mutual_information
from models.bayesnet import Config, Model, equal_bins
from training.data import Dataset

TINY = ImageSpace(2, 2, 1, labels=("a", "b", "c"))
EVERY = torch.tensor(list(itertools.product(range(4), repeat=4))).view(-1, 1, 2, 2)  # all images of 2×2, 2 bits
NETWORKS = pytest.mark.parametrize(
    "config",
    [
        Config(bins=3, levels=4, by_class=True),
        Config(bins=4, levels=4),
        Config(bins=2, levels=4, by_class=True, tree=False),
    ],
    ids=["tree by class", "tree", "naive Bayes"],
)


def grid(levels: Tensor, top: int = 3) -> Tensor:
    return (levels * (255 / top)).round() / 255


def images(n: int, seed: int = 0, space: ImageSpace = TINY, top: int = 3) -> tuple[Tensor, Tensor]:
    """Levels that depend on the class and on a neighbour, on the grid k / 255, and labels."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(len(space.labels), (n,), generator=generator)
    noise = torch.rand(n, *space.shape, generator=generator)
    shared = torch.rand(n, 1, 1, 1, generator=generator)
    levels = ((0.5 * noise + 0.4 * shared + 0.05 * y[:, None, None, None]) * top * 1.2).round().clamp(0, top)
    return grid(levels, top), y


def learnt(config: Config, x: Tensor, y: Tensor, space: ImageSpace = TINY) -> Model:
    model = Model(config, space)
    with torch.no_grad():
        model.prepare([Batch(x[i : i + 50], y[i : i + 50]) for i in range(0, len(x), 50)])
    return model.eval()


def network(config: Config) -> Model:
    """Learnt, then moved about: what holds must hold for any parameters."""
    model = learnt(config, *images(300))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def log_prob(score: Score) -> Tensor:
    assert score.log_prob is not None
    return score.log_prob.double()


# -------------------------------------------------------------------------------------------------------- probabilities


@NETWORKS
def test_of_images_that_it_draws_no_pixel_is_a_surprise_in_the_mean(config: Config) -> None:
    model, x = network(config), grid(EVERY)
    score = model.evaluate(x, unlabelled(x))
    surprise = model.surprise(x, unlabelled(x)).double()
    mean = (log_prob(score).exp()[:, None, None] * surprise).sum(dim=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-5)
    torch.testing.assert_close(score.statistics["worst_pixel"].double(), surprise.amax(dim=(1, 2)))
    torch.testing.assert_close(score.statistics["worst_tile"].double(), surprise.sum(dim=(1, 2)), rtol=1e-4, atol=1e-4)


@NETWORKS
def test_probabilities_of_all_images_sum_to_one(config: Config) -> None:
    model = network(config)
    x = grid(EVERY)
    for label in (-1, 0, 2) if config.by_class else (-1,):
        total = log_prob(model.log_prob(x, torch.full((256,), label))).exp().sum()
        assert float(total) == pytest.approx(1, abs=1e-6)


def test_probabilities_of_8_bit_images_sum_to_one() -> None:
    space = ImageSpace(2, 1, 1)
    x = torch.cartesian_prod(torch.arange(256), torch.arange(256)).view(-1, 1, 1, 2) / 255
    data, y = images(200, space=dataclasses.replace(space, labels=("a",)), top=255)
    model = learnt(Config(bins=7), data, y, space)
    assert float(log_prob(model.log_prob(x)).exp().sum()) == pytest.approx(1, abs=1e-5)


def test_the_marginal_is_over_the_classes() -> None:
    model = network(Config(bins=3, levels=4, by_class=True))
    x = grid(EVERY)
    given = torch.stack([log_prob(model.log_prob(x, torch.full((256,), c))) for c in range(3)])
    joint = given + model.class_prior(torch.tensor([-1])).T
    torch.testing.assert_close(log_prob(model.log_prob(x)), joint.logsumexp(dim=0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.class_posterior(x), joint.softmax(dim=0).T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.class_posterior(x).sum(dim=1), torch.ones(256, dtype=torch.float64))


@NETWORKS
def test_the_entropy_is_that_of_each_pixel_given_its_parents(config: Config) -> None:
    """And averaged over the model's own images it is the model's entropy, as -log_prob is."""
    model = network(config)
    for label in (0, 1) if config.by_class else (-1,):
        score = model.log_prob(grid(EVERY), torch.full((256,), label))
        p = log_prob(score).exp()
        assert score.per_pixel is not None
        torch.testing.assert_close(score.per_pixel.flatten(1).sum(dim=1), score.log_prob)
        expected = -(p * log_prob(score)).sum()
        torch.testing.assert_close((p * score.statistics["entropy"]).sum(), expected, rtol=1e-5, atol=1e-5)


def test_only_rounded_levels_count_where_the_network_has_fewer() -> None:
    model = learnt(Config(bins=2, levels=2), *images(100))
    note = model.spec.likelihood.note if model.spec.likelihood else ""
    assert note == "of the image rounded to 2 levels"
    a, b = torch.tensor([0.0, 0.9, 0.2, 0.7]), torch.tensor([0.4, 1.0, 0.0, 0.6])
    scores = log_prob(model.log_prob(torch.stack([a, b]).view(2, 1, 2, 2)))
    assert scores[0] == scores[1]
    drawn = model.image(model.step(model.init([Draw(0, k, 1) for k in range(30)])))
    assert set(drawn.unique().tolist()) == {0.0, 1.0}


# ------------------------------------------------------------------------------------------------------------- learning


def test_tables_are_smoothed_frequencies() -> None:
    x, y = images(400)
    config = Config(bins=4, levels=4, by_class=True, smoothing=2.0)
    model = learnt(config, x, y)
    levels = (x * 3).round().long().flatten(1)
    tables = model.tree.tables.exp()
    for i, parent in enumerate(model.parent.tolist()):
        mine = levels[y == 1]
        alone = (torch.bincount(mine[:, i], minlength=4) + 2 / 4) / (len(mine) + 2)
        if parent < 0:
            torch.testing.assert_close(tables[1, i], alone.double().expand(4, -1), rtol=1e-5, atol=1e-6)
            continue
        for above in range(4):
            counts = torch.bincount(mine[mine[:, parent] == above, i], minlength=4)
            expected = (counts + 2 * alone) / (counts.sum() + 2)
            torch.testing.assert_close(tables[1, i, above], expected.double(), rtol=1e-5, atol=1e-6)
    prior = (torch.bincount(y) + 2 / 3) / 402
    torch.testing.assert_close(model.class_prior(torch.tensor([-1]))[0].exp().float(), prior.float())


def test_levels_inside_a_bin_are_smoothed_frequencies_of_the_pixel() -> None:
    x, y = images(300)
    model = learnt(Config(bins=2, levels=4, smoothing=1.0), x, y)
    levels = (x * 3).round().long().flatten(1)
    assert model.bin_of.tolist() in ([0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1])
    within = model.within.exp()
    for b in range(2):
        member = (model.bin_of == b).nonzero()[:, 0]
        total = torch.bincount(levels.flatten(), minlength=4)[member]
        prior = (total + 1 / len(member)) / (total.sum() + 1)
        for i in range(4):
            counts = torch.bincount(levels[:, i], minlength=4)[member]
            expected = (counts + prior) / (counts.sum() + 1)
            torch.testing.assert_close(within[i, member], expected.double(), rtol=1e-5, atol=1e-6)
            assert float(within[i, member].sum()) == pytest.approx(1)


def test_bins_hold_about_as_much_each_and_have_a_level_at_least() -> None:
    even = equal_bins(torch.ones(256, dtype=torch.int64), 16)
    assert torch.bincount(even).tolist() == [16] * 16
    black = torch.ones(256, dtype=torch.int64)
    black[0] = 10_000
    assert torch.bincount(equal_bins(black, 6)).tolist() == [1, 51, 51, 51, 51, 51]
    ends = torch.zeros(8, dtype=torch.int64)
    ends[-1] = 5
    assert torch.bincount(equal_bins(ends, 8)).tolist() == [1] * 8
    assert (equal_bins(ends, 3).diff() >= 0).all()
    assert equal_bins(ends, 3).unique().tolist() == [0, 1, 2]


def test_mutual_information_of_variables_whose_joint_is_known() -> None:
    """A fair coin, the same coin, one that agrees with it in three of four throws, and one of its own."""
    agreeing = [(a, a, b, c) for a in (0, 1) for b in [a] * 3 + [1 - a] for c in (0, 1)]
    found = mutual_information(torch.tensor(agreeing, dtype=torch.uint8), 2)
    part = math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    expected = [
        [math.log(2), math.log(2), part, 0],
        [math.log(2), math.log(2), part, 0],
        [part, part, math.log(2), 0],
        [0, 0, 0, math.log(2)],
    ]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_counting_is_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randint(3, (100, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    whole = mutual_information(values, 3)
    monkeypatch.setattr(_trees, "ROWS", 7)
    torch.testing.assert_close(mutual_information(values, 3), whole)


def edges(parent: Tensor) -> set[frozenset[int]]:
    return {frozenset((i, p)) for i, p in enumerate(parent.tolist()) if p >= 0}


def test_chow_liu_recovers_a_planted_tree() -> None:
    rng = np.random.default_rng(0)
    dims = 12
    planted = [-1] + [int(rng.integers(i)) for i in range(1, dims)]
    v = np.zeros((4000, dims), dtype=np.uint8)
    v[:, 0] = rng.integers(3, size=4000)
    for i in range(1, dims):
        keep = rng.random(4000) < 0.7
        v[:, i] = np.where(keep, (v[:, planted[i]] + i) % 3, rng.integers(3, size=4000))
    shuffled = rng.permutation(dims)
    found = chow_liu(mutual_information(torch.from_numpy(v[:, shuffled]), 3))
    place = np.argsort(shuffled)
    truth = {frozenset((int(place[i]), int(place[p]))) for i, p in enumerate(planted) if p >= 0}
    assert edges(found) == truth


def test_the_spanning_tree_is_the_heaviest_of_all_and_hangs_from_its_centre() -> None:
    """Of five variables there are 125 trees (Prüfer codes)."""
    weights = torch.rand(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    weights = weights + weights.T
    heaviest = max(
        sum(float(weights[tuple(e)]) for e in tree)
        for tree in itertools.combinations(list(itertools.combinations(range(5), 2)), 4)
        if spans(tree)
    )
    found = chow_liu(weights)
    assert sum(float(weights[tuple(e)]) for e in edges(found)) == pytest.approx(heaviest)
    chain = torch.zeros(9, 9)
    for i in range(8):
        chain[i, i + 1] = chain[i + 1, i] = 1.0
    assert [len(layer) for layer in layers(chow_liu(chain))] == [1, 2, 2, 2, 2]


def spans(tree: tuple[tuple[int, int], ...]) -> bool:
    reached = {0}
    for _ in tree:
        reached |= {j for e in tree for j in e if reached & set(e)}
    return len(reached) == 5


def test_parents_that_go_round_are_refused() -> None:
    assert [layer.tolist() for layer in layers(torch.tensor([1, -1, 0]))] == [[1], [0], [2]]
    with pytest.raises(ValueError, match="not a tree"):
        layers(torch.tensor([1, 0, -1]))


def test_a_tree_is_likelier_than_independence_and_classes_help() -> None:
    x, y = images(2000)
    held, held_y = images(2000, seed=9)

    def nats(config: Config, labels: Tensor) -> float:
        return float(log_prob(learnt(config, x, y).log_prob(held, labels)).mean())

    alone, tree = (nats(Config(bins=4, levels=4, tree=t), unlabelled(held)) for t in (False, True))
    by_class = nats(Config(bins=4, levels=4, by_class=True), held_y)
    assert alone + 0.1 < tree
    assert tree < by_class


def test_the_class_as_a_parent_needs_labels() -> None:
    x, _ = images(10)
    with pytest.raises(ValueError, match="by_class: some images have no label"):
        learnt(Config(bins=2, by_class=True), x, unlabelled(x))
    model = learnt(Config(bins=4, levels=4, by_class=True), x, torch.zeros(10, dtype=torch.int64))
    assert log_prob(model.log_prob(x, torch.full((10,), 2))).isfinite().all(), "a class that was never seen is uniform"


# ------------------------------------------------------------------------------------------------------------ inference


def brute(model: Model, x: Tensor, observed: Tensor, label: int) -> tuple[Tensor, Tensor]:
    """All images that agree with x (1, 2, 2) where observed, and their joint log-probabilities with each class."""
    every = grid(EVERY)
    agree = ((every == x) | ~observed).flatten(1).all(dim=1)
    classes = len(model.log_prior)
    prior = model.class_prior(torch.tensor([label]))[0]
    joint = torch.stack(
        [log_prob(model.log_prob(every, torch.full((256,), c if classes > 1 else -1))) for c in range(classes)], dim=1
    )
    return every[agree], (joint + prior)[agree]


MASKS = [torch.tensor(mask).view(1, 2, 2) for mask in itertools.product([False, True], repeat=4)]


@NETWORKS
def test_messages_give_what_enumeration_gives(config: Config) -> None:
    model = network(config)
    x = grid(EVERY)[[27, 200]]
    for observed, label in itertools.product(MASKS, (-1, 1) if config.by_class else (-1,)):
        labels = torch.full((2,), label)
        marginals = model.marginals(x, observed, labels)
        best = model.most_likely(x, observed, labels)
        posterior = model.class_posterior(x, observed)
        for k in range(2):
            candidates, joint = brute(model, x[k], observed, label)
            weight = joint.flatten().softmax(dim=0).view(joint.shape).sum(dim=1)  # p(image | observed)
            levels = (candidates * 3).round().long()
            expected = (torch.nn.functional.one_hot(levels, 4) * weight[:, None, None, None, None]).sum(dim=0)
            torch.testing.assert_close(marginals[k], expected, rtol=1e-4, atol=1e-6)
            assert torch.equal(best[k], candidates[int(joint.max(dim=1).values.argmax())])
            if label == -1:
                torch.testing.assert_close(posterior[k], joint.logsumexp(dim=0).softmax(dim=0), rtol=1e-4, atol=1e-6)


@NETWORKS
def test_completions_are_drawn_from_the_posterior(config: Config) -> None:
    model, n = network(config), 40_000
    x = grid(EVERY)[99:100]
    observed = torch.tensor([[True, False], [False, True]])
    draws = [Draw(seed=5, sample=k, steps=1) for k in range(n)]
    with torch.inference_mode():
        found = model.complete(x.expand(n, -1, -1, -1), observed.expand(1, 1, 2, 2), draws)
    assert torch.equal(found[:, :, observed], x[:, :, observed].expand(n, -1, -1))
    candidates, joint = brute(model, x[0], observed[None], -1)
    weight = joint.flatten().softmax(dim=0).view(joint.shape).sum(dim=1)
    share = torch.stack([(found == candidate).flatten(1).all(dim=1).double().mean() for candidate in candidates])
    assert float(share.sum()) == pytest.approx(1)
    assert ((share - weight).abs() < 4.5 * (weight * (1 - weight) / n).sqrt() + 1e-9).all()


def test_a_completion_depends_on_its_draw_alone() -> None:
    model = network(Config(bins=3, levels=4, by_class=True))
    x, observed = grid(EVERY)[:6], torch.tensor([True, False]).view(1, 1, 1, 2)
    draws = [Draw(seed=k, sample=2, steps=1, label=k % 3) for k in range(6)]
    together = model.complete(x, observed, draws)
    for k in (0, 5):
        assert torch.equal(model.complete(x[k : k + 1], observed, draws[k : k + 1])[0], together[k])


def test_nothing_observed_is_the_prior() -> None:
    model = network(Config(bins=3, levels=4, by_class=True))
    x, nothing = grid(EVERY)[:4], torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    draws = [Draw(seed=k, sample=0, steps=1) for k in range(4)]
    assert torch.equal(model.complete(x, nothing, draws), model.image(model.step(model.init(draws))))
    prior = model.class_prior(torch.tensor([-1])).expand(4, -1).exp()
    torch.testing.assert_close(model.class_posterior(x, nothing), prior)


def test_messages_of_a_deep_tree_of_many_classes() -> None:
    """log p(evidence) and marginals on a random tree of nine ternary variables, against enumeration."""
    generator = torch.Generator().manual_seed(0)
    parent = torch.tensor([3, 3, 1, -1, 2, 0, 4, 4, 0])
    tree = Tree(parent, torch.randn(2, 9, 3, 3, dtype=torch.float64, generator=generator).log_softmax(dim=-1))
    evidence = torch.randn(1, 9, 3, dtype=torch.float64, generator=generator)
    evidence[0, 5, 1] = -torch.inf
    values = torch.tensor(list(itertools.product(range(3), repeat=9)))
    joint = tree.terms(values).sum(dim=2) + evidence[0, torch.arange(9), values].sum(dim=1, keepdim=True)
    messages = tree.collect(evidence, torch.logsumexp)
    torch.testing.assert_close(messages.total[0], joint.logsumexp(dim=0))
    torch.testing.assert_close(tree.collect(evidence, torch.amax).total[0], joint.max(dim=0).values)
    p = joint.softmax(dim=0)
    expected = torch.einsum("nc,ndk->cdk", p, torch.nn.functional.one_hot(values, 3).double())
    torch.testing.assert_close(tree.marginals(messages)[0], expected)


# ------------------------------------------------------------------------------------------------------------- sampling


@NETWORKS
def test_samples_are_as_frequent_as_they_are_probable(config: Config) -> None:
    model, n = network(config), 20_000
    label = 1 if config.by_class else -1
    draws = [Draw(seed=2, sample=k, steps=1, label=label) for k in range(n)]
    with torch.inference_mode():
        x = model.image(model.step(model.init(draws)))
    place = torch.tensor([64, 16, 4, 1])
    found = torch.bincount(((x * 3).round().long().flatten(1) * place).sum(dim=1), minlength=256) / n
    p = log_prob(model.log_prob(grid(EVERY), torch.full((256,), label))).exp()
    assert ((found - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1 / n).all()


def test_a_low_temperature_draws_the_likeliest_bins() -> None:
    model = network(Config(bins=4, levels=4, tree=False))
    with torch.no_grad():
        model.table_logits.mul_(2)
    cold = [Draw(seed=k, sample=0, steps=1, temperature=0.1) for k in range(200)]
    x = model.image(model.step(model.init(cold)))
    mode = model.tree.tables[0, :, 0].argmax(dim=1)
    assert ((x * 3).round().long().flatten(1) == mode).double().mean() > 0.9


# ------------------------------------------------------------------------------------------------------------ real data


@pytest.mark.realdata
@pytest.mark.slow
def test_binarised_mnist_lands_on_the_published_values(mnist: Dataset) -> None:
    """Stochastically binarised: a pixel is white with its grey value for a probability. 134.9 nats for the Chow–Liu
    tree, 205.8 for independent pixels, of test images."""
    generator = torch.Generator().manual_seed(0)

    def binarised(split: str) -> Tensor:
        grey = torch.from_numpy(mnist.splits[split].x).float() / 255
        return (torch.rand(grey.shape, generator=generator) < grey).float()

    x, test = binarised("train"), binarised("test")

    def nats(tree: bool) -> float:
        model = Model(Config(tree=tree, bins=2, levels=2), mnist.space)
        with torch.inference_mode():
            model.prepare([Batch(part, unlabelled(part)) for part in torch.split(x, 5000)])
            scores = [log_prob(model.log_prob(part)) for part in torch.split(test, 500)]
        return -float(torch.cat(scores).mean())

    assert nats(tree=True) == pytest.approx(134.9, abs=2.0)
    assert nats(tree=False) == pytest.approx(205.8, abs=2.0)


# --------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": 1}, "levels: 1"),
        ({"levels": 300}, "levels: 300"),
        ({"bins": 1}, "bins: 1"),
        ({"bins": 5, "levels": 4}, "bins: 5 is not in 2 … 4"),
        ({"smoothing": 0.0}, "smoothing: 0.0"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Model(Config(**changes), TINY)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="by_class"):
        Model(Config(by_class=True), ImageSpace(2, 2, 1))
