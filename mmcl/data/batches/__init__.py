"""Training and evaluation batches: permutation, batch plan, collate, loaders, shared memory."""
