"""Export formats: a merged folder, GGUF files, Ollama, vLLM; and the certificate that each computes the same model."""
