"""``reft-judge``: win rates by a judge."""
