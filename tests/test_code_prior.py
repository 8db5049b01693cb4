"""The learnt distribution of codes: an inverse, a density, and what it learns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models._code_prior import CodePrior


def disturbed(latent: int, told: int) -> CodePrior:
    """With weights that are not zero anywhere."""
    torch.manual_seed(0)
    prior = CodePrior(latent, told, width=16, couplings=4)
    with torch.no_grad():
        for p in prior.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return prior


@pytest.mark.parametrize(("latent", "told"), [(6, 3), (5, 3), (4, 0)])
def test_its_density_is_that_of_what_it_draws(latent: int, told: int) -> None:
    """log p(z) = log N(ε) − log |det ∂z/∂ε|, by autograd, at z = f(ε)."""
    prior = disturbed(latent, told)
    epsilon, known = torch.randn(3, latent), torch.randn(3, told)
    z = prior(epsilon, known)

    def one(e: Tensor, k: Tensor) -> Tensor:
        out: Tensor = prior(e[None], k[None])[0]
        return out

    jacobians = torch.stack(
        [torch.autograd.functional.jacobian(lambda e, k=k: one(e, k), e) for e, k in zip(epsilon, known, strict=True)]
    )
    normal = -0.5 * (epsilon.square() + math.log(2 * math.pi)).sum(dim=1)
    torch.testing.assert_close(prior.log_prob(z, known), normal - torch.linalg.slogdet(jacobians)[1])


def test_it_is_standard_normal_at_first() -> None:
    prior = CodePrior(5, 2)
    epsilon, known = torch.randn(4, 5), torch.randn(4, 2)
    assert torch.equal(prior(epsilon, known), epsilon)


def test_a_row_depends_on_its_own_alone() -> None:
    prior = disturbed(6, 3)
    epsilon, known = torch.randn(4, 6), torch.randn(4, 3)
    torch.testing.assert_close(prior(epsilon, known)[1:2], prior(epsilon[1:2], known[1:2]))


@pytest.mark.slow
def test_learns_codes_that_hang_together_and_on_what_is_told() -> None:
    """Told one of two directions, both codes lie near a circle's arc on that side."""
    torch.manual_seed(0)
    prior = CodePrior(2, 1, width=32, couplings=6)
    optimiser = torch.optim.Adam(prior.parameters(), lr=3e-3)

    def some(n: int) -> tuple[Tensor, Tensor]:
        told = torch.randint(0, 2, (n, 1)) * 2.0 - 1
        angle = math.pi * torch.rand(n, 1) - math.pi / 2
        return torch.cat([told * angle.cos(), angle.sin()], dim=1) * 1.5 + 0.05 * torch.randn(n, 2), told

    for _ in range(600):
        z, told = some(256)
        loss = -prior.log_prob(z, told).mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    with torch.inference_mode():
        _, told = some(1000)
        drawn = prior(torch.randn(1000, 2), told)
    assert ((drawn[:, :1] * told) > -0.3).float().mean() > 0.95
    assert (drawn.norm(dim=1) - 1.5).abs().mean() < 0.2
