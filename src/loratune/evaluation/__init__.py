"""Base against tuned on held-out data: answers, scores, and how sure the difference is."""
