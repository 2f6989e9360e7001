"""Validation and preview of a stream: ``mmcl data validate`` and ``mmcl data preview``."""
