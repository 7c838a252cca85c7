"""The base model: where it is found, how it loads, and what is attached to it."""
