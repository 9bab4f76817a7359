"""For the unit tests: no cluster is joined, and no engine started."""

import pytest

from tests.support.fabricated import FakePools


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> FakePools:
    """The pools of a score stage and of a regeneration, with engines that are not there."""
    fake = FakePools()
    monkeypatch.setattr("jobs.stages.score.run_pools", fake)
    monkeypatch.setattr("jobs.caches.regenerate.join_cluster", lambda: None)
    return fake
