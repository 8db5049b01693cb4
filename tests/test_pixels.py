"""Statistics of pixels' surprises, against their definitions."""

from __future__ import annotations

import pytest
import torch

from models import _pixels


def test_tiles_cover_images_that_they_do_not_divide() -> None:
    values = torch.arange(30.0).view(1, 5, 6)
    tiles = _pixels.tiles(values, 4)
    assert tiles.shape == (1, 2, 2)
    assert tiles.sum() == values.sum()
    assert tiles[0, 1, 1] == values[0, 4:, 4:].sum()


def test_neighbour_product_is_the_mean_over_pairs() -> None:
    values = torch.tensor([[[1.0, 2.0, 3.0], [5.0, 7.0, 11.0]]])
    right, lower = 1 * 2 + 2 * 3 + 5 * 7 + 7 * 11, 1 * 5 + 2 * 7 + 3 * 11
    assert _pixels.neighbour_product(values).item() == pytest.approx((right + lower) / 7)
    assert _pixels.neighbour_product(values[:, :1, :1]).item() == 0


def test_terms_are_the_log_probability_and_the_entropy_of_a_categorical_distribution() -> None:
    logits, levels = torch.randn(5, 4, 3), torch.randint(0, 3, (5, 4))
    log_prob, entropy = _pixels.terms(logits, levels)
    distribution = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(log_prob, distribution.log_prob(levels))
    torch.testing.assert_close(entropy, distribution.entropy())
