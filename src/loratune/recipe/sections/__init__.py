"""The five sections of a recipe, a module each; a field's docstring is its only documentation."""
