"""Shards: tars and loose files, their indexes, and copies that are kept."""
