"""Optimization of a task: named parameter groups, learning-rate schedules, settings per stage."""
