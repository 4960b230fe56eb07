"""Use a model with interventions in other libraries: Trainer, trl, pipelines, Accelerate, lm-eval."""
