"""Adapters in PEFT's format as material: read, combined, resized, extracted from a full fine-tune, and checked."""
