"""Trees over discrete variables: the one that Chow and Liu (1968) choose, and exact inference by messages along it.

values      (N, D) integers 0 … K − 1
parent      (D,) int64: each variable's parent; -1 at a root. A forest without edges is a tree too
layers      the variables by depth, roots first: all of a layer are handled at once
tables      (C, D, P, K) log p(v_i = k | v_parent = p, class c); P = K, or 1 where no variable has a parent
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

ROWS = 8192  # that are counted together


# ------------------------------------------------------------------------------------------------------------ structure


def mutual_information(values: Tensor, states: int) -> Tensor:
    """(D, D) nats of the empirical distribution of every pair of variables; the diagonal holds entropies.

    By products of indicator matrices, one for each pair of states: exact counts, in memory of D² numbers.
    """
    n, dims = values.shape
    single = torch.stack([(values == a).sum(dim=0) for a in range(states)]).double() / n  # (K, D)
    total = torch.zeros(dims, dims, dtype=torch.float64, device=values.device)
    for a in range(states):
        for b in range(a, states):
            counts = sum((part == a).float().mT @ (part == b).float() for part in torch.split(values, ROWS))
            joint = torch.as_tensor(counts).double() / n
            term = torch.special.xlogy(joint, joint / (single[a][:, None] * single[b]).clamp(min=1e-300))
            total += term if a == b else term + term.mT
    return total


def chow_liu(weights: Tensor) -> Tensor:
    """(D,) parents in the spanning tree with the greatest sum of weights (D, D), which are symmetric. The root is at
    the tree's centre, so that its layers are few."""
    weights = weights.cpu().clone().fill_diagonal_(-torch.inf)
    neighbours: list[list[int]] = [[] for _ in weights]
    best, nearest = weights[0].clone(), torch.zeros(len(weights), dtype=torch.int64)  # Prim 1957, from variable 0
    inside = torch.zeros(len(weights), dtype=torch.bool)
    inside[0] = True
    for _ in range(len(weights) - 1):
        new = int(best.masked_fill(inside, -torch.inf).argmax())
        inside[new] = True
        neighbours[new].append(int(nearest[new]))
        neighbours[int(nearest[new])].append(new)
        nearest[weights[new] > best] = new
        best = torch.maximum(best, weights[new])
    parent, _ = _from(neighbours, _centre(neighbours))
    return torch.tensor(parent)


def _from(neighbours: Sequence[Sequence[int]], root: int) -> tuple[list[int], list[int]]:
    """The parents of all variables seen from the root, and the variables in the order of their depth."""
    parent, order = [-1] * len(neighbours), [root]
    for i in order:
        for j in neighbours[i]:
            if j != parent[i]:
                parent[j] = i
                order.append(j)
    return parent, order


def _centre(neighbours: Sequence[Sequence[int]]) -> int:
    """The middle of a longest path: from the variable that is farthest from any other, to the farthest from it."""
    end = _from(neighbours, 0)[1][-1]
    parent, order = _from(neighbours, end)
    path = [order[-1]]
    while parent[path[-1]] >= 0:
        path.append(parent[path[-1]])
    return path[len(path) // 2]


def layers(parent: Tensor) -> list[Tensor]:
    """Indices of the variables at depth 0, 1, … Raises `ValueError` where parents go round in a circle."""
    found, layer = [], (parent < 0).nonzero()[:, 0]
    while len(layer):
        found.append(layer)
        layer = torch.isin(parent, layer).nonzero()[:, 0]
    if sum(map(len, found)) != len(parent):
        raise ValueError("parent: not a tree; some variables descend from no root")
    return found


# ------------------------------------------------------------------------------------------------------------ inference


class Reduce(Protocol):
    """How the values of a variable are done away with: `torch.logsumexp` (all of them) or `torch.amax` (the likeliest
    alone)."""

    def __call__(self, input: Tensor, *, dim: int) -> Tensor: ...


@dataclass(frozen=True)
class Messages:
    """What has come up a tree from the evidence. nats."""

    inward: Tensor  # (B, C, D, K) the evidence of a variable and of all that hangs below it, by the variable's value
    to_parent: Tensor  # (B, C, D, P) the same with the variable itself done away with, by its parent's value
    total: Tensor  # (B, C) log p(evidence | class); with `torch.amax`, of its likeliest completion


@dataclass(frozen=True)
class Tree:
    """A distribution of D variables for each of C classes."""

    parent: Tensor  # (D,)
    tables: Tensor  # (C, D, P, K)

    @cached_property
    def layers(self) -> list[Tensor]:
        return layers(self.parent)

    @cached_property
    def _variables(self) -> Tensor:
        return torch.arange(len(self.parent), device=self.parent.device)

    def terms(self, values: Tensor) -> Tensor:
        """(B, C, D) log p(v_i | v_parent, class) of values (B, D)."""
        return self.tables[:, self._variables, self._above(values, self.parent), values].transpose(0, 1)

    def by_parent(self, tables: Tensor, values: Tensor) -> Tensor:
        """(B, C, D) what other tables (C, D, P) hold for the parents' values among values (B, D)."""
        return tables[:, self._variables, self._above(values, self.parent)].transpose(0, 1)

    def collect(self, evidence: Tensor, reduce: Reduce) -> Messages:
        """Messages from the leaves to the roots (Pearl 1988), in all classes: evidence (B, D, K) is the logarithm of
        what is known of a variable's values, 0 for nothing and -inf for what they cannot be."""
        classes, dims, p, _ = self.tables.shape
        inward = evidence[:, None].repeat(1, classes, 1, 1)
        to_parent = evidence.new_zeros(len(evidence), classes, dims, p)
        for nodes in reversed(self.layers):
            to_parent[:, :, nodes] = reduce(self.tables[:, nodes] + inward[:, :, nodes, None], dim=-1)
            above = self.parent[nodes]
            if int(above[0]) >= 0:
                inward.index_add_(2, above, to_parent[:, :, nodes])
        roots = self.layers[0]
        return Messages(inward, to_parent, to_parent[:, :, roots, 0].sum(dim=2))

    def descend(self, inward: Tensor, label: Tensor, pick: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Values (B, D), chosen from the roots to the leaves. inward (B, D, K), that of each row's class label (B,).

        pick: unnormalised log-probabilities (B, n, K) of variables (n,) whose parents are chosen -> values (B, n).
        """
        values = torch.zeros(inward.shape[:2], dtype=torch.int64, device=inward.device)
        for nodes in self.layers:
            above = self._above(values, self.parent[nodes])
            values[:, nodes] = pick(self.tables[label[:, None], nodes, above] + inward[:, nodes], nodes)
        return values

    def marginals(self, messages: Messages) -> Tensor:
        """(B, C, D, K) p(v_i | evidence, class), from what `collect` gave with `torch.logsumexp`."""
        found = torch.zeros_like(messages.inward)
        for nodes in self.layers:
            joint = self.tables[:, nodes] + messages.inward[:, :, nodes, None]
            given = (joint - messages.to_parent[:, :, nodes, :, None]).exp()  # (B, C, n, P, K) p(v_i | v_parent, …)
            above = self.parent[nodes]
            if int(above[0]) < 0:
                found[:, :, nodes] = given[..., 0, :]
            else:
                found[:, :, nodes] = (found[:, :, above, None] @ given)[..., 0, :]
        return found

    @staticmethod
    def _above(values: Tensor, parent: Tensor) -> Tensor:
        """(B, n) values of the parents (n,) among values (B, D); 0 for those that have none."""
        return values[:, parent.clamp(min=0)] * (parent >= 0)
