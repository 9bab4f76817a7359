"""Every table of hostile input counts, and no case of a table hides another."""

import importlib.util
import re
from pathlib import Path

import pytest

from tests.support.hostile import Case

FILES = sorted(set(Path(__file__).parent.glob("test_*.py")) - {Path(__file__)})


def tables(path: Path) -> dict[str, list[Case]]:
    """The tables of a test module by their names."""
    spec = importlib.util.spec_from_file_location(f"hostile_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, list) and value and all(isinstance(item, Case) for item in value)
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_cases_of_a_table_have_names_of_their_own(path: Path) -> None:
    found = tables(path)
    assert found
    for name, cases in found.items():
        names = [case.name for case in cases]
        assert len(set(names)) == len(names), f"{name}: {sorted(names)}"


def test_the_documents_name_no_more_inputs_than_there_are() -> None:
    counts = {path.stem: sum(map(len, tables(path).values())) for path in FILES}
    text = (Path(__file__).parents[3] / "docs/measurements.md").read_text()
    said = re.search(r"(\d+),(\d{3}) broken and hostile inputs", text)
    assert said is not None
    assert 600 <= int(said[1] + said[2]) <= sum(counts.values()), counts
