"""Diagnostics of checkpoints: mode connectivity, representation similarity, flatness, probes."""
