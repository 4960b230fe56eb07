"""``reft-report paper``: runs next to the numbers that the paper prints."""
