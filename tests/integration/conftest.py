"""One local Ray head for all tests that need a cluster."""

from collections.abc import Iterator

import pytest

from jobs.local_head import LocalHead, local_head


@pytest.fixture(scope="session")
def ray_head() -> Iterator[LocalHead]:
    """A head with 4 logical CPUs, shared by the whole session."""
    with local_head(num_cpus=4, num_gpus=0, custom_resources={"polystill_test": 1.0}) as head:
        yield head
