"""Changing a model in place, reversibly: targets, class swap, selection."""
