"""``reft-report paper``: compare runs with the numbers printed in the paper."""
