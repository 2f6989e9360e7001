"""mmcl: continual learning for vision-language models."""
