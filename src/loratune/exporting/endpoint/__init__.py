"""A server with an OpenAI-compatible API, asked whether it serves the model that was trained."""
