"""Answers of generative models: greedy decoding, candidates, and questions of one image."""
