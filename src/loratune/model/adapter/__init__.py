"""The LoRA adapter: which modules it attaches to, its variants, and what is trained in addition to it."""
