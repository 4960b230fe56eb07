"""``reft-report``: run folders -> statistics -> tables, plots and one HTML page.

``runs`` and ``studies`` read folders, ``grouping`` decides which runs share one of the ``comparisons``, ``scores``
turns predictions into measures of weighted rows, ``statistics`` resamples and tests them for ``evidence``; ``tables``
formats the results, ``records``, ``plots`` and ``page`` write them, ``command`` is the command.
"""
