"""What other libraries need to take a model with interventions: Trainer, trl, pipelines, Accelerate, lm-eval."""
