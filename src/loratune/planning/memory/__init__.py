"""Bytes at the peak of a run, component by component."""
