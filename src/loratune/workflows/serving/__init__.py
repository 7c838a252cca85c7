"""loratune's own server: several adapters on one base, behind an OpenAI-compatible API."""
