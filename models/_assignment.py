"""Pairs of least total cost: Bertsekas' auction algorithm (1988), in tensor operations."""

from __future__ import annotations

import torch
from torch import Tensor


def least_cost_pairs(cost: Tensor, slack: float = 0.01) -> Tensor:
    """(n,) a permutation π whose Σᵢ cost[i, π_i] exceeds the least possible by at most n · slack · the costs' standard
    deviation. cost (n, n), finite.

    All who have nothing bid at once for what suits them best: they raise its price by what the second best would lose
    them, and `slack` more. An object goes to the highest bidder, and who had it bids anew.
    """
    n = len(cost)
    if n < 2:
        return torch.arange(n, device=cost.device)
    benefit = -cost.double()
    raise_by = slack * float(benefit.std()) or 1.0
    price = benefit.new_zeros(n)
    owner = torch.full((n,), -1, device=cost.device)
    has = torch.full((n,), -1, device=cost.device)
    while len(bidders := (has < 0).nonzero()[:, 0]):
        best, second = (benefit[bidders] - price).topk(2, dim=1).values.T
        wanted = (benefit[bidders] - price).argmax(dim=1)
        bids = benefit.new_full((len(bidders), n), -torch.inf)
        bids[torch.arange(len(bidders), device=cost.device), wanted] = best - second + raise_by
        highest, winner = bids.max(dim=0)
        sold = highest.isfinite().nonzero()[:, 0]
        before = owner[sold]
        has[before[before >= 0]] = -1
        owner[sold] = bidders[winner[sold]]
        has[owner[sold]] = sold
        price[sold] += highest[sold]
    return has
