"""Overrides of the command line that cannot be what their writer meant."""

from pathlib import Path

import pytest

from pipeline.config.load import load_config
from tests.support.hostile import Case, check_answer
from tests.support.quickstart import QUICKSTART

pytestmark = pytest.mark.timeout(30)

FORMS = [
    Case("no key", "=x", ("'=x' is not of the form key=value",)),
    Case("no equals sign", "seed", ("'seed' is not of the form key=value",)),
    Case("misspelt", "sed=1", ("unknown key 'sed'", "did you mean 'seed'")),
    Case("below a value", "seed.x=1", ("seed",)),
    Case("no such place of a list", "prompts.sources.9.path=x", ("prompts.sources.9",)),
    Case("brackets left open", "seed={a: [", ("seed={a: [",)),
]


@pytest.mark.parametrize("case", FORMS, ids=str)
def test_an_override_is_answered(case: Case, tmp_path: Path) -> None:
    root = f"storage.root={tmp_path}"
    check_answer(case, lambda: load_config(QUICKSTART / "config.yaml", [root, case.given]))
