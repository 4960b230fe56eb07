"""Baselines to compare ReFT with: the methods of the peft library, BitFit, full finetuning, the frozen model."""
