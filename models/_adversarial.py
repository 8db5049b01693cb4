"""What a critic is taught by: losses on its logits, and penalties on its gradient. D is a critic, x images, y whatever
it is told beside them; B rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

CriticFunction = Callable[[Tensor, Tensor], Tensor]  # (x, labels) -> logits (B,)


def gradient_norm_squared(critic: CriticFunction, x: Tensor, labels: Tensor) -> Tensor:
    """(B,) |∇ₓ D(x, y)|², itself differentiable; in the precision of x and the weights, whatever the autocast."""
    with torch.autocast(x.device.type, enabled=False):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(critic(x, labels).sum(), x, create_graph=True)
        return gradient.square().sum(dim=(1, 2, 3))


def r1_penalty(critic: CriticFunction, real: Tensor, labels: Tensor) -> Tensor:
    """R1: ½ E |∇ₓ D(x)|² over real images (arXiv 1801.04406, eq. 9, without γ)."""
    return gradient_norm_squared(critic, real, labels).mean() / 2


def gradient_penalty(critic: CriticFunction, real: Tensor, fake: Tensor, labels: Tensor) -> Tensor:
    """E (|∇ D(x̂)| − 1)², x̂ uniform between a real and a drawn image (arXiv 1704.00028, eq. 3, without λ)."""
    epsilon = torch.rand(real.shape[0], 1, 1, 1, device=real.device)
    norm = gradient_norm_squared(critic, torch.lerp(fake, real, epsilon), labels).clamp(min=1e-12).sqrt()
    return (norm - 1).square().mean()


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The critic's hinge loss on its logits (arXiv 1802.05957, eq. 16)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def wasserstein_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The critic's estimate of the Wasserstein-1 distance, negated (arXiv 1704.00028, eq. 2)."""
    return fake.mean() - real.mean()


def logistic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The critic's logistic loss on its logits (arXiv 1406.2661, eq. 1, negated)."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()
