"""Sources → rows → conversations → verified examples → steps → tensors."""
