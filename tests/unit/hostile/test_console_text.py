"""Text of servers, files and jobs on its way to a terminal."""

import logging

import pytest

from jobs.console import log_to_console, write
from pipeline.messages import foreign, harmless
from tests.support.hostile import Case, check_answer, check_readable

pytestmark = pytest.mark.timeout(30)

SHOWN = [
    Case("plain", ("one\ttwo\nthree", "one\ttwo\nthree")),
    Case("other scripts", ("naïve 模型 עברית 🙂", "naïve 模型 עברית 🙂")),
    Case("a joined emoji and wide spaces", ("👩\u200d💻\u3000\u00a0x", "👩\u200d💻\u3000\u00a0x")),
    Case("the screen is cleared", ("a\x1b[2Jb", "a\\x1b[2Jb")),
    Case("the title is set", ("\x1b]0;title\x07", "\\x1b]0;title\\x07")),
    Case("the clipboard is set", ("\x1b]52;c;aGk=\x1b\\", "\\x1b]52;c;aGk=\\x1b\\")),
    Case("a link of a terminal", ("\x1b]8;;http://x\x07y", "\\x1b]8;;http://x\\x07y")),
    Case("the terminal is asked for its name", ("\x1b[c", "\\x1b[c")),
    Case("the cursor goes up", ("\x1b[1A\x1b[2Kok", "\\x1b[1A\\x1b[2Kok")),
    Case("colours of Ray", ("\x1b[36m(pid=7)\x1b[0m done", "(pid=7) done")),
    Case("concealed text", ("\x1b[8msecret", "secret")),
    Case("colours by other signs", ("\x1b[38:2::1:2:3mx", "x")),
    Case("a control sequence in one character", ("\x9b2J", "\\x9b2J")),
    Case("backspaces", ("error\x08\x08ok", "error\\x08\\x08ok")),
    Case("a bell, a NUL, a DEL", ("\x07\x00\x7f", "\\x07\\x00\\x7f")),
    Case("a line written over", ("failed\rfine", "failed\\rfine")),
    Case("lines of Windows", ("a\r\nb", "a\nb")),
    Case("text backwards", ("a\u202eb\u2066c", "a\\u202eb\\u2066c")),
    Case("half of a character", ("a\ud800b", "a\\ud800b")),
    Case("a name that is no UTF-8", (b"caf\xe9".decode(errors="surrogateescape"), "caf\\udce9")),
]


@pytest.mark.parametrize("case", SHOWN, ids=str)
def test_the_console_shows_text_and_obeys_none(
    case: Case, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, shown = case.given
    assert check_answer(case, lambda: harmless(given)) == shown
    # pytest's own handlers would put the text into a report, which half a character cannot enter
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    log_to_console()
    logging.getLogger("teachers.x").info("%s", given)
    logging.getLogger("another").warning("%s", given)
    write(given)
    printed = capsys.readouterr()
    assert printed.out == f"{shown}\n{shown}\n" and printed.err == f"{shown}\n"


QUOTED = [
    Case("lines", ("a\n  b\tc ", "a b c")),
    Case("an escape", ("\x1b[2J\x1b[31mx", "\\x1b[2J\\x1b[31mx")),
    Case("nothing that can be seen", ("a\u200b\u202e\U000e0041", "a\\u200b\\u202e\\U000e0041")),
    Case("a number", (10**40, "1" + "0" * 40)),
    Case("a list", ([1, "a\x1b"], "[1, 'a\\x1b']")),
    Case("None", (None, "None")),
    Case("long", ("x" * 10**6, "x" * 297 + "...")),
    Case("long after escapes", ("\x1b" * 200, "\\x1b" * 74 + "\\...")),
    Case("spaces", (" " * 10**6, "...")),
    Case("as long as allowed", ("y" * 300, "y" * 300)),
]


@pytest.mark.parametrize("case", QUOTED, ids=str)
def test_foreign_words_in_a_message_are_one_short_line(case: Case) -> None:
    given, shown = case.given
    assert check_answer(case, lambda: foreign(given)) == shown
    check_readable(shown)
