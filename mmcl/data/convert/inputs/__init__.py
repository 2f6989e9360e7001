"""Inputs of ``mmcl data convert``: folders, tables, JSON and files of captions as records."""
