"""Tiny trained demo models and the shape world they know."""
