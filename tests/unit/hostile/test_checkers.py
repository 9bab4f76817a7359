"""Names of checkers that are none, modules that cannot be imported, verdicts that are none."""

import sys
from pathlib import Path

import pytest

from pipeline.checkers.answer_checkers import SafeChecker, checker_identity, find_checker
from tests.support.hostile import Case, check_answer

pytestmark = pytest.mark.timeout(30)

MODULES = {
    "sound": "import os\nfrom os import renames\nVALUE = 1\n"
    "def same(answer, reference): return answer == reference\n"
    "def more(answer, reference, strict=False): return answer == reference\n"
    "def any_number(*texts): return texts[0] == texts[1]\n"
    "def one(answer): return True\n"
    "def three(answer, reference, question): return True\n"
    "def named(*, answer, reference): return True\n"
    "async def later(answer, reference): return True\n"
    "def lazy(answer, reference): yield True\n"
    "class Check:\n    def __call__(self, answer, reference): return True\n"
    "check = Check()\n"
    "def word(answer, reference): return 'no'\n"
    "def many(answer, reference): return [False] * 10**6\n"
    "def none(answer, reference): return None\n"
    "def number(answer, reference): return 1.0\n"
    "def raises(answer, reference): raise RuntimeError('x' * 10**6)\n"
    "def deep(answer, reference): return deep(answer, reference)\n",
    "raising": "raise RuntimeError('no licence\\x1b[2J')\n",
    "leaving": "import sys\nsys.exit(3)\n",
    "unfinished": "def check(answer, reference\n",
    "lacking": "import a_package_that_nobody_has\n",
    "dividing": "VALUE = 1 / 0\n",
}

NAMES = [
    Case("empty", "", ("is no checker", "package.module.function")),
    Case("dots in front", "..x", ("'..x' is no checker",)),
    Case("a dot in front", ".sound.same", ("is no checker",)),
    Case("dots alone", "..", ("is no checker",)),
    Case("a dot behind", "sound.", ("is no checker",)),
    Case("two dots", "sound..same", ("is no checker",)),
    Case("spaces", "exact ", ("'exact ' is no checker",)),
    Case("a path", "checkers/mine.py", ("is no checker",)),
    Case("a colon", "sound:same", ("is no checker",)),
    Case("a call", "sound.same()", ("is no checker",)),
    Case("a lambda", "lambda a, r: True", ("is no checker",)),
    Case("a line break", "sound.same\n", ("is no checker",)),
    Case("NUL", "sound\0.same", ("'sound\\x00.same' is no checker",)),
    Case("half a character", "\ud800.x", ("'\\ud800.x' is no checker",)),
    Case("1 MB", "x." * 500_000, ("is no checker",)),
    Case("misspelt", "exakt", ("did you mean 'exact'",)),
    Case("no module", "no_such_module.check", ("cannot be imported", "install its package")),
    Case("no function", "sound.no_such", ("sound has no function 'no_such'",)),
    Case("a value", "sound.VALUE", ("has no function 'VALUE'",)),
    Case("a class", "sound.Check", ("has no function 'Check'",)),
    Case("an object that can be called", "sound.check", ("has no function 'check'",)),
    Case("a method", "sound.Check.__call__", ("cannot be imported",)),
    Case("a module that raises", "raising.check", ("raises RuntimeError", "no licence")),
    Case("a module that ends Python", "leaving.check", ("raises SystemExit", "correct leaving")),
    Case("a module that is no Python", "unfinished.check", ("raises SyntaxError",)),
    Case("a module that divides by 0", "dividing.check", ("raises ZeroDivisionError",)),
    Case("a module that lacks another", "lacking.check", ("a_package_that_nobody_has",)),
    Case("os.renames", "os.renames", ("Python's own library",)),
    Case("os.path.join", "os.path.join", ("Python's own library",)),
    Case("os.path.samefile", "os.path.samefile", ("Python's own library",)),
    Case("shutil.move", "shutil.move", ("Python's own library",)),
    Case("shutil.copyfile", "shutil.copyfile", ("Python's own library",)),
    Case("subprocess.call", "subprocess.call", ("Python's own library",)),
    Case("a function of os by another name", "sound.renames", ("Python's own library",)),
    Case("os.system", "os.system", ("has no function",)),
    Case("eval", "builtins.eval", ("has no function",)),
    Case("one argument", "sound.one", ("two arguments",)),
    Case("three arguments", "sound.three", ("two arguments",)),
    Case("arguments by name alone", "sound.named", ("two arguments",)),
    Case("asynchronous", "sound.later", ("asynchronous",)),
    Case("a generator", "sound.lazy", ("a generator",)),
    Case("a sound one", "sound.same"),
    Case("an argument with a default", "sound.more"),
    Case("any number of arguments", "sound.any_number"),
    Case("a shipped one", "number"),
]

# Verdict, and the words of the error, of an answer that is right by the words.
VERDICTS: list[Case] = [
    Case("right", ("sound.same", True, None)),
    Case("a text", ("sound.word", False, "it returned 'no'")),
    Case("a list of 10^6", ("sound.many", False, "it returned [False")),
    Case("none", ("sound.none", None, None)),
    Case("1.0", ("sound.number", True, None)),
    Case("an error of 1 MB", ("sound.raises", False, "RuntimeError: xxx")),
    Case("recursion", ("sound.deep", False, "RecursionError")),
]


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("case", NAMES, ids=str)
def test_names_are_answered(case: Case) -> None:
    found = check_answer(case, lambda: (find_checker(case.given), checker_identity(case.given)))
    assert case.refusal or found[0]("7", "7") is True


@pytest.mark.parametrize("case", VERDICTS, ids=str)
def test_verdicts_are_answered(case: Case) -> None:
    name, expected, words = case.given
    verdict, problem = check_answer(case, lambda: SafeChecker(name).judge("a", "a"))
    assert verdict is expected
    assert (problem is None) if words is None else (words in problem and len(problem) < 500)
