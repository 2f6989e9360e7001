"""Shards that lie elsewhere: addresses, fetching, and the cache."""
