"""ReFT models: a frozen base model with a set of (Phi, P, l)."""
