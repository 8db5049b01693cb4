"""Annealed importance sampling (Neal 2001): ratios of partition functions along a path of distributions.

A path p_β ∝ f_β runs from β = 0, which can be normalised and drawn from, to β = 1, the distribution that is asked for.
A chain that moves along it, by transitions that leave each p_β as it is, gathers a weight w = Π f_β' / f_β, and

    E w = Z₁ / Z₀      for chains that begin as draws from p₀
    E 1/w = Z₀ / Z₁    for chains that begin as draws from p₁ and move backwards, by reversible transitions

By Jensen's inequality the logarithm of the first's mean is too low on average, and that of the second's too high: the
two bracket log Z₁ (Burda, Grosse and Salakhutdinov, arXiv 1412.8566; Grosse et al., arXiv 1511.02543).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

S = TypeVar("S")


def anneal(
    state: S, betas: Sequence[float], log_f: Callable[[S, float], Tensor], transition: Callable[[S, float], S]
) -> tuple[Tensor, S]:
    """log w (B,) float64 of chains that moved along `betas`, and where they ended. Rising betas: w is the weight of
    f at the last over f at the first; falling ones, from the last distribution to the first: its inverse.

    log_f(state, β) (B,): log f_β.
    transition(state, β): one move that leaves p_β as it is; reversible where betas fall.
    """
    log_w: Tensor | float = 0.0
    for here, there in pairwise(betas):
        if there < here:
            state = transition(state, here)
        log_w = log_w + log_f(state, there).double() - log_f(state, here).double()
        if there > here:
            state = transition(state, there)
    assert isinstance(log_w, Tensor), "betas: at least two"
    return log_w, state


def log_mean(log_w: Tensor) -> tuple[Tensor, Tensor]:
    """log of the mean of w over the last dimension, and its standard error to first order, both (...,)."""
    n = log_w.shape[-1]
    mean = log_w.logsumexp(dim=-1) - math.log(n)
    relative = torch.exp(log_w - mean[..., None])
    return mean, relative.std(dim=-1) / math.sqrt(n)
