"""The base model and what is attached to it: loading, device and types, adapter, quantization, kernels."""
