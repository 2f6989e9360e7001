"""Writers of a stream: shards and card."""
