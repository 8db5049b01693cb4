"""The offline half: data, one training loop, recipes, evaluation. Writes checkpoints."""
