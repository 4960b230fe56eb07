"""Hugging Face models: loading them, and what needs to be known about their internals."""
