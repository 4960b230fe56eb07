"""The LightningModules, the optimizer's groups, checkpoints, and what W&B shows."""
