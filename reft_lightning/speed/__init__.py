"""Exact shortcuts: the same losses and gradients with less computation."""
