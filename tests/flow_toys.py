"""What the tests of flows share: moved weights, noise, and Jacobians by autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from models._flow_model import FlowModel
from models._protocol import Draw, ImageSpace

DIGIT = ImageSpace(8, 8, 1)

M = TypeVar("M", bound=nn.Module)


def perturbed(module: M, by: float = 0.3, seed: int = 0) -> M:
    """The module with every parameter moved, so that no zero at the start hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return module.eval().requires_grad_(False)


def grey(n: int, space: ImageSpace = DIGIT, seed: int = 0) -> Tensor:
    """n random 8-bit images."""
    return torch.randint(0, 256, (n, *space.shape), generator=torch.Generator().manual_seed(seed)) / 255


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def jacobian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(outputs, inputs) of f at x (1, C, H, W), by autograd."""
    x = x.clone().requires_grad_()
    rows = [torch.autograd.grad(out, x, retain_graph=True)[0].flatten() for out in f(x).flatten()]
    return torch.stack(rows)


def jacobian_log_det(f: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """log |det| of the Jacobian of f at x (1, C, H, W)."""
    return float(torch.linalg.slogdet(jacobian(f, x))[1])


def images(model: FlowModel, draws: list[Draw]) -> Tensor:
    """What the model draws, (B, C, H, W)."""
    with torch.inference_mode():
        return model.image(model.step(model.init(draws)))
