"""The fast implementations of attention, cross-entropy and LoRA linear layers. Each is tested against the plain one."""
