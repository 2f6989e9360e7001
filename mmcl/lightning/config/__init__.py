"""Configuration of a run: the parser, its errors, and which Trainer settings a run obeys."""
