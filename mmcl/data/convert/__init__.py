"""Conversion of your own data to a stream: ``mmcl data convert``."""
