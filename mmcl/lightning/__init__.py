"""The only folder that imports pytorch_lightning."""
