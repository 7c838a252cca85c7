"""The six sections of a recipe, one module each; a field's docstring is its only documentation."""
