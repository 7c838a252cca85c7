"""The ways out: a merged folder, GGUF files, what Ollama and vLLM take, and the proof that each is the same model."""
