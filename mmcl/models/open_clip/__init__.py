"""Contrastive dual encoders of open_clip behind the VLM protocol."""
