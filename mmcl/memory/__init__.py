"""What is remembered: references to old samples, rows of tensors, snapshots of weights."""
