"""Guidance before training: a recipe to start from, what settings do, what the machine can do, a plain script."""
