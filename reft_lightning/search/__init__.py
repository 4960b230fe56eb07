"""``reft-search``: the settings of several methods on one budget."""
