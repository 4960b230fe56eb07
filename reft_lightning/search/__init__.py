"""``reft-search``: search the settings of several methods with equal budgets."""
