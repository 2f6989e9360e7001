"""Registry of base models and adapters, and reuse of adapters on the next base (recycling)."""
