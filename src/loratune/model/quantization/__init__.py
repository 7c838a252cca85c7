"""Frozen base weights in fewer bits: which kinds there are, how they are made, and checkpoints that come quantized."""
