"""Export formats (a merged folder, GGUF files, Ollama, vLLM, MLX), and the certificate that an export is the trained
model."""
