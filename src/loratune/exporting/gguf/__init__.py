"""Write GGUF files: the merged model, the adapter, and the tokenizer."""
