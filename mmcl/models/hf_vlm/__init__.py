"""Generative vision-language models of transformers (LLaVA and others) behind the VLM protocol."""
