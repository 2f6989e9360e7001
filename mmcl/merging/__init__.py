"""Model merging: the weights of several checkpoints as one, on full weights and on adapters."""
