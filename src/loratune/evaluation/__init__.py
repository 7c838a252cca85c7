"""Compare base and fine-tuned model on held-out data: answers, scores, and confidence intervals."""
