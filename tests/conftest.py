"""All tests: hypothesis has no time limit, since a busy machine is no error of ours, and every test
below `tests/integration` has the mark of its folder.
"""

from pathlib import Path

import pytest
from hypothesis import settings

INTEGRATION = Path(__file__).parent / "integration"

settings.register_profile("polystill", deadline=None)
settings.load_profile("polystill")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of `tests/integration`, which start real Ray, vLLM or DeepSpeed."""
    for item in items:
        if item.path.is_relative_to(INTEGRATION):
            item.add_marker(pytest.mark.integration)
