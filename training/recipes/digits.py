"""Recipes for scikit-learn's digits (8×8 grey, ten classes): seconds to minutes on a laptop, nothing to download."""

from __future__ import annotations
