"""Recipes for Fashion-MNIST (28×28 grey, ten classes): what the zoo ships."""

from __future__ import annotations
