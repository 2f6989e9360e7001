"""Remote shards: addresses, downloads and the cache."""
