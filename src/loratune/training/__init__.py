"""The optimizer step, and everything around it: batches, loss, checkpoints, events."""
