"""The LightningModules, optimizer groups, checkpoints and W&B reports."""
