"""Names and paths that reach the model card, which is published with the model."""

from pathlib import Path

import pytest
import yaml

from tests.support.hostile import Case, check_answer
from tests.unit.export.test_card import TUNED, card_of

pytestmark = pytest.mark.timeout(30)

NAMES = [
    Case("usual", ("org/Some-Model-1.5B", "(org/Some-Model-1.5B)")),
    Case("underscores", ("org/my_model_v2", r"(org/my\_model\_v2)")),
    Case("link", ("a/[click](javascript:x)", r"(a/\[click\]\(javascript\:x\))")),
    Case("image", ("a/![x](//e.org/i.png)", r"(a/\!\[x\]\(//e.org/i.png\))")),
    Case("HTML", ("a/<script>x</script>", r"(a/\<script\>x\</script\>)")),
    Case("entity", ("a/&lt;b", r"(a/\&lt\;b)")),
    Case("code", ("a/`rm`", r"(a/\`rm\`)")),
    Case("emphasis", ("a/**x**~~y~~", r"(a/\*\*x\*\*\~\~y\~\~)")),
    Case("address", ("www.e.org/x", r"(www\.e.org/x)")),
    Case("mail", ("a/x@e.org", r"(a/x\@e.org)")),
    Case("table", ("a|b", r"(a\|b)")),
    Case("mathematics", ("a/$x$", r"(a/\$x\$)")),
    Case("backslash", ("a\\b", r"(a\\b)")),
    Case("heading in a line of its own", ("a\n# b", r"(a \# b)")),
    Case("fence in a line of its own", ("a\n```\nb", r"(a \`\`\` b)")),
]
FOLDERS = [
    Case("teacher", ["teachers.words.model=/home/someone/models/words"]),
    Case("teacher with a space", ["teachers.words.model=/home/someone/my models/words"]),
    Case("weights", [*TUNED, "student.initial_weights=/home/someone/runs/a/checkpoints/step-4"]),
    Case("argument", ["student.template_arguments={enable_thinking: /home/someone/a/b}"]),
]


@pytest.mark.parametrize("case", NAMES, ids=str)
def test_a_hub_id_is_shown_as_it_is_spelled(case: Case, tmp_path: Path) -> None:
    name, shown = case.given
    override = f"teachers.words.model={yaml.safe_dump(name, default_style=chr(34)).strip()}"
    header, card = check_answer(case, lambda: card_of([override], tmp_path))
    text = card.split("## Provenance")[0].split("---\n")[2]
    assert f"distilled from arithmetic, words {shown} with polystill" in text
    assert header["library_name"] == "transformers"
    block = card.split("```yaml\n")[1].rpartition("```")[0]
    assert yaml.safe_load(block)["teachers"]["words"]["model"] == name


@pytest.mark.parametrize("case", FOLDERS, ids=str)
def test_no_place_on_the_machine_is_published(case: Case, tmp_path: Path) -> None:
    _, card = check_answer(case, lambda: card_of(case.given, tmp_path))
    assert "someone" not in card and "/home" not in card
    assert str(Path(__file__).parents[3]) not in card, "the quickstart's own models"


def test_folders_are_published_by_their_names(tmp_path: Path) -> None:
    values = ["teachers.words.model=/home/someone/models/words"]
    card = card_of([*values, "student.initial_weights=/home/someone/x/step-4"], tmp_path)[1]
    provenance = yaml.safe_load(card.split("```yaml\n")[1].rpartition("```")[0])
    assert provenance["teachers"]["words"]["model"] == "words"
    assert provenance["teachers"]["arithmetic"]["model"] == "arithmetic"
    assert provenance["initial_weights"] == "step-4"
