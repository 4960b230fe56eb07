"""`reft-report`: run folders -> statistics -> tables, plots and one HTML page.

`runs` reads folders, `scores` turns predictions into measures of weighted rows, `statistics` resamples them,
`comparisons` decides what may stand in one table; `tables`, `plots` and `page` write, `command` is the command.
"""
