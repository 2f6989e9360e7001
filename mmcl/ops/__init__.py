"""Equations of the methods, as pure functions of tensors."""
