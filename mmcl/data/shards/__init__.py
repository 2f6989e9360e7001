"""Shards: tars and JSON files in place, their indexes, and copies of replay samples."""
