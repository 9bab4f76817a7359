"""One local Ray head for the tests of a module that need a cluster."""

from collections.abc import Iterator

import pytest

from jobs.cluster.local_head import LocalHead, local_head


@pytest.fixture(scope="module")
def ray_head() -> Iterator[LocalHead]:
    """A head with 4 logical CPUs.

    It ends with its module: while it lives this process's environment asks Ray for a token, and
    modules that start Ray in this process have none.
    """
    with local_head(num_cpus=4, num_gpus=0, custom_resources={"polystill_test": 1.0}) as head:
        yield head
