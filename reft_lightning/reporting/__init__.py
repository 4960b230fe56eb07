"""`reft-report`: run folders -> statistics -> tables, plots and one HTML page.

`runs` and `studies` read folders, `grouping` decides what may stand in one of the `comparisons`, `scores` turns
predictions into measures of weighted rows, `statistics` resamples and tests them for `evidence`; `tables` says it,
`records`, `plots` and `page` write it, `command` is the command.
"""
