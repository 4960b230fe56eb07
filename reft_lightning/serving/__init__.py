"""reft-serve: many adapters of one base model behind an OpenAI-compatible endpoint."""
