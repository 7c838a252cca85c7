"""From a conversation to tokens and the mask of those that are trained, found in two independent ways."""
