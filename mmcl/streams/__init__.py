"""Streams that mmcl makes by itself: each builder writes plain shards and a card beside them."""
