"""What a user asks before training: which recipe, what each setting does, whether the machine can, and how it would look
as a plain script."""
