"""Work on adapters in PEFT's format: read, combine, resize, extract from a full fine-tune, and check them."""
