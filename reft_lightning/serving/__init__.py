"""reft-serve: many adapters on one base model behind an OpenAI-compatible endpoint."""
