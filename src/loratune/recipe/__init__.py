"""The recipe: every setting of a run, how YAML becomes one, and which settings contradict each other."""
