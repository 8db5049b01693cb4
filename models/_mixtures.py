"""What mixtures over classes or components share: labels as evidence, draws, terms pixel by pixel."""

from __future__ import annotations

import torch
from torch import Tensor


def given(log_prior: Tensor, labels: Tensor, noise: float = 0.0) -> Tensor:
    """(B, C) log p(class | label), where a share `noise` of labels says nothing: the prior (C,) for the label -1, else
    the label's class, but with the probability `noise` the prior again. Averaged over labels it is the prior."""
    classes = torch.arange(len(log_prior), device=labels.device)
    told = (classes == labels[:, None]) * (1 - noise) + noise * log_prior.exp()
    return torch.where(labels[:, None] < 0, log_prior, told.to(log_prior.dtype).log())


def choose(log_weights: Tensor, uniforms: Tensor) -> Tensor:
    """Indices (B, ...) drawn in proportion to exp(log_weights) (B, ..., M), by the quantiles at uniforms (B, ...).

    In float64 the distribution function ends above any uniform of float32's steps, and where a weight is zero it is
    flat: the index is always in range and possible.
    """
    cumulative = log_weights.double().softmax(dim=-1).cumsum(dim=-1)
    return torch.searchsorted(cumulative.contiguous(), uniforms.double()[..., None].contiguous(), right=True)[..., 0]


def chain_rule(log_weights: Tensor, terms: Tensor) -> Tensor:
    """(B, D) log p(x_i | x_<i) of a mixture, which sum to its log p(x).

    log_weights (B, M) nats; terms (B, M, D): each component's own log p(x_i | x_<i), for an order of the dimensions i
    that all components share.
    """
    upto = (log_weights[:, :, None] + terms.cumsum(dim=2)).logsumexp(dim=1)  # log p(x_≤i)
    return upto.diff(dim=1, prepend=log_weights.logsumexp(dim=1)[:, None])
