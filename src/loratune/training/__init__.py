"""The optimizer step and everything around it: micro-batches, loss, checkpoints, events. Start at `fast_trainer`."""
