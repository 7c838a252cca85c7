"""GPUs to plan for, clusters of them, and the links between them."""
