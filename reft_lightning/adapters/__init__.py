"""Adapted models: a base model with everything that is trained in it or added to it."""
