"""Hugging Face models: where they come from, and what has to be known of their insides."""
