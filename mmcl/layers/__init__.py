"""Modules that a strategy installs in ``attach``."""
