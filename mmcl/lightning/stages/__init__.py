"""Stages of a model's life in a run: settings per stage, schedules over tasks, gates, budgets."""
