"""Streams of what people have: ``mmcl data make``."""
