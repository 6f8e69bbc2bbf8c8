"""Measures of a model's quality, over any engine."""
