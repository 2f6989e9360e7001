"""The equations, as pure functions of tensors."""
