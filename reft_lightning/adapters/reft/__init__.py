"""ReFT models: a frozen base model with a set of triples (Phi, P, l)."""
