"""For the unit tests: no cluster is joined, no engine started, and one thread computes."""

import sys
from collections.abc import Iterator

import pytest

from tests.support.fabricated import FakePools


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Lets torch compute in one thread: the threads of two test processes wait for each other."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> FakePools:
    """The pools of a score stage and of a regeneration, with engines that are not there."""
    fake = FakePools()
    monkeypatch.setattr("jobs.stages.score.run_pools", fake)
    monkeypatch.setattr("jobs.caches.regenerate.join_cluster", lambda: None)
    return fake
