"""``reft-inspect``: what an adapter does inside its model, and what a run will cost."""
