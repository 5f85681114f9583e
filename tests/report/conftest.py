"""The report's tests render made-up evaluations."""

from tests.evaluation.conftest import made_up  # noqa: F401
