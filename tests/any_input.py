"""How many examples hypothesis draws: few and always the same in `make test`, many and new ones in a slow run.

    REFT_EXAMPLES=2000 python -m pytest --timeout 0 tests/config/test_any_configuration.py tests/data/test_any_rows.py \
        tests/adapters/test_any_adapter_file.py tests/adapters/reft/test_any_positions.py
"""

import os

from hypothesis import HealthCheck, settings

MANY = int(os.environ.get("REFT_EXAMPLES", "0"))
CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much]


def examples(count):
    """Return the settings of a test of so many examples."""
    return settings(
        max_examples=MANY or count, derandomize=not MANY, database=None, deadline=None, report_multiple_bugs=False,
        suppress_health_check=CHECKS, print_blob=bool(MANY),
    )  # fmt: skip


def tried(call, *refusals):
    """Return (what a call returns, None), or (None, what it says) where it refuses by one of these errors."""
    try:
        return call(), None
    except refusals as error:
        return None, str(error)
