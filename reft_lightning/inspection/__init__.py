"""What an adapter does inside its model, and what a run will need: ``reft-inspect``."""
