"""``reft-report paper``: runs beside the numbers that the paper prints."""
