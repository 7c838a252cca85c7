"""The LoRA adapter: which modules it attaches to, its variants, and what is trained beside it."""
