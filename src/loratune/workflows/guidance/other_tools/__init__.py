"""Configuration files of other fine-tuning tools, read as settings of a recipe."""
