"""Checkpoints of a run: written atomically, checked before use, with the state they hold."""
