"""Exact shortcuts: the same losses and gradients for less."""
