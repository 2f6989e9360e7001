"""From tar to Batch."""
