"""Adapted models: a base model with whatever is trained of it or on it."""
