"""All tests: hypothesis has no time limit, since a busy machine is no error of ours, every test
below `tests/integration` has the mark of its folder, and any test can ask for a real model.
"""

from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.real_model import fetched_model

INTEGRATION = Path(__file__).parent / "integration"

settings.register_profile("polystill", deadline=None)
settings.load_profile("polystill")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of `tests/integration`, which start real Ray, vLLM or DeepSpeed."""
    for item in items:
        if item.path.is_relative_to(INTEGRATION):
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session")
def real_model() -> Path:
    """Folder of SmolLM2-135M-Instruct, as `examples/smollm2/fetch.py` makes it; never changed.

    A real chat model: 30 layers, 576 wide, 49,152 ids, tied embeddings, bfloat16, ChatML with a
    default system prompt.
    """
    return fetched_model()
