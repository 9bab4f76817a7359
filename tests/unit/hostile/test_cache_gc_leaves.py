"""Storage roots in which things lie that `cache gc` must not touch, or that hide who needs a cache.

Every case begins with one run, its caches, and one cache that no run names (`stale`), and adds
something. What is somebody else's is left and named; where nobody can know whether a cache is
needed, nothing at all is removed.
"""

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.__main__ import main
from jobs.caches.actions import collect_garbage
from pipeline import storage
from tests.support.fabricated import FabricatedRun, FakePools
from tests.support.hostile import Case, check_answer

pytestmark = pytest.mark.timeout(30)

HASH = "0123456789abcdef" * 2
OLD = 1_000_000_000
TEMPORARY = f".{HASH}.parquet.0123abcd.tmp"


class Place:
    """A copy of the storage root of one case, with a folder outside of it."""

    def __init__(self, folder: Path, template: Path) -> None:
        self.root, self.outside = folder / "root", folder / "outside"
        shutil.copytree(template, self.root)
        write(self.outside / "g1" / f"{HASH}.parquet", "precious")
        write(self.outside / f"{HASH}.parquet", "precious")
        self.caches, self.run = self.root / "caches", self.root / "runs/quickstart"
        (name,) = storage.read_json(str(template.parent / "stale.json"))
        self.stale = self.caches / name
        used = storage.read_json(str(self.run / "stages/score.caches.json"))
        self.used = self.caches / min(used)

    @property
    def files(self) -> dict[str, bytes | str]:
        """Content of every file, target of every link, and name of everything else."""
        found: dict[str, bytes | str] = {}
        for folder in (self.root, self.outside):
            for path in folder.rglob("*"):
                if path.is_symlink():
                    found[str(path)] = os.readlink(path)
                elif path.is_file():
                    found[str(path)] = path.read_bytes()
                else:
                    found[str(path)] = "a folder or another thing"
        return found


Given = Callable[[Place], Any]


def write(path: Path, content: str = "somebody else's") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def file(path: str, content: str = "somebody else's") -> Given:
    """A file below the root; `STALE` and `USED` stand for the folders of caches."""

    def given(place: Place) -> Path:
        return write(at(place, path), content)

    return given


def old(path: str, content: str = "half") -> Given:
    """A file that was last changed long ago."""

    def given(place: Place) -> Path:
        written = write(at(place, path), content)
        os.utime(written, (OLD, OLD))
        return written

    return given


def link(path: str, target: str = "OUTSIDE", instead: bool = False) -> Given:
    def given(place: Place) -> Path:
        made = at(place, path)
        if instead:
            shutil.rmtree(made) if made.is_dir() else made.unlink()
        made.parent.mkdir(parents=True, exist_ok=True)
        made.symlink_to(target.replace("OUTSIDE", str(place.outside)))
        return made

    return given


def at(place: Place, path: str) -> Path:
    return place.root / path.replace("STALE", f"caches/{place.stale.name}").replace(
        "USED", f"caches/{place.used.name}"
    )


def folder(path: str) -> Given:
    def given(place: Place) -> Path:
        at(place, path).mkdir(parents=True)
        return at(place, path)

    return given


def pipe(path: str) -> Given:
    def given(place: Place) -> Path:
        at(place, path).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(at(place, path))
        return at(place, path)

    return given


def unix_socket(place: Place) -> Path:
    path = place.stale / "g1" / "s"
    with socket.socket(socket.AF_UNIX) as bound:
        here = os.open(path.parent, os.O_RDONLY)
        bound.bind(f"/proc/self/fd/{here}/{path.name}")  # paths of sockets are short
        os.close(here)
    return path


def renamed_copy(name: str) -> Given:
    """A copy of the unneeded cache under a name that is not its own."""

    def given(place: Place) -> Path:
        target = place.caches / name.replace("STALE", place.stale.name)
        return Path(shutil.copytree(place.stale, target))

    return given


def shards_of_another(place: Place) -> Path:
    target = place.caches / f"words-{HASH[:16]}"
    shutil.copytree(place.stale / "g1", target / "g1")
    return target


def hard_link(place: Place) -> Path:
    shard = next((place.stale / "g1").glob("*.parquet"))
    os.link(shard, place.outside / "kept.parquet")
    return place.outside / "kept.parquet"


def linked_manifest(place: Place) -> Path:
    path = place.stale / "manifest.json"
    shutil.move(path, place.outside / "manifest.json")
    path.symlink_to(place.outside / "manifest.json")
    return path


def piped_config(place: Place) -> Path:
    (place.run / "config.yaml").unlink()
    os.mkfifo(place.run / "config.yaml")
    return place.run / "config.yaml"


def undecodable(place: Place) -> Path:
    path = os.fsencode(place.caches) + b"/caf\xe9"
    os.mkdir(path)
    return Path(os.fsdecode(path))


LEFT = [
    Case("a folder of photos", file("caches/photos/a.jpg")),
    Case("a file beside the caches", file("caches/README.md")),
    Case("an empty folder", folder("caches/mine")),
    Case("a file with the name of a cache", file(f"caches/words-{HASH[:16]}")),
    Case("the name of a cache alone", file(f"caches/photos-{HASH[:16]}/a.jpg")),
    Case("the manifest of a browser extension", file(f"caches/x-{HASH[:16]}/manifest.json", "{}")),
    Case("a manifest that is a list", file(f"caches/x-{HASH[:16]}/manifest.json", "[]")),
    Case("a manifest that is no JSON", file(f"caches/x-{HASH[:16]}/manifest.json", "{")),
    Case(
        "a manifest with a foreign recipe",
        file(f"caches/x-{HASH[:16]}/manifest.json", '{"recipe": {"flour": 500}, "generation": 1}'),
    ),
    Case("a table that is no shard", file(f"caches/x-{HASH[:16]}/g1/{HASH}.parquet")),
    Case("shards of another fingerprint", shards_of_another),
    Case("a backup beside it", renamed_copy("STALE.bak")),
    Case("a copy by a file manager", renamed_copy("STALE (copy)")),
    Case("a copy under another fingerprint", renamed_copy(f"words-{HASH[:16]}")),
    Case("a name in capitals", renamed_copy("words-0123456789ABCDEF")),
    Case("notes in an unneeded cache", file("STALE/notes.txt")),
    Case("notes among its shards", file("STALE/g1/notes.md")),
    Case("a folder among its shards", file(f"STALE/g1/mine/{HASH}.parquet")),
    Case("an empty folder among its shards", folder("STALE/g1/mine")),
    Case("a backup of a generation", file(f"STALE/g1.bak/{HASH}.parquet")),
    Case("a generation with a leading zero", file(f"STALE/g01/{HASH}.parquet")),
    Case("generation zero", file(f"STALE/g0/{HASH}.parquet")),
    Case("a generation in capitals", file(f"STALE/G1/{HASH}.parquet")),
    Case("Arabic digits", file(f"STALE/g\u0661/{HASH}.parquet")),
    Case("a shard in capitals", file(f"STALE/g1/{HASH.upper()}.parquet")),
    Case("a shard of another length", file(f"STALE/g1/{HASH[:-1]}.parquet")),
    Case("a shard with a line break", file(f"STALE/g1/{HASH}.parquet\n")),
    Case("what a file manager leaves", file("STALE/.DS_Store")),
    Case("the swap file of an editor", file("STALE/.manifest.json.swp")),
    Case("a file that NFS keeps open", file("STALE/g1/.nfs0000000000000001")),
    Case("notes in a cache that is used", file("USED/notes.txt")),
    Case("notes among corrupt shards", file("USED/g1.aside/why.txt")),
    Case("another file among the quarantine", file("USED/g1.quarantine/todo.json")),
    Case("a link to a folder", link("caches/elsewhere")),
    Case("a link with the name of a cache", link(f"caches/words-{HASH[:16]}")),
    Case("a link to nowhere", link("caches/gone", "/nowhere")),
    Case("a link to a file in an unneeded cache", link(f"STALE/g1/{HASH}.parquet", "OUTSIDE/g1")),
    Case("a linked generation", link("STALE/g2", "OUTSIDE/g1")),
    Case("a linked folder of corrupt shards", link("USED/g1.aside", "OUTSIDE/g1")),
    Case("a linked quarantine", link("USED/g1.quarantine", "OUTSIDE/g1")),
    Case("a link to the folder above", link("STALE/up", "..")),
    Case("a link to itself", link("STALE/g1/loop", "loop")),
    Case("a linked manifest", linked_manifest),
    Case("a named pipe", pipe(f"STALE/g1/{HASH}.parquet")),
    Case("a named pipe beside the caches", pipe("caches/pipe")),
    Case("a socket", unix_socket),
    Case("another name of a shard elsewhere", hard_link),
    Case("a name that is no UTF-8", undecodable),
    Case("a name with control characters", file("caches/\x1b[2J\x07")),
    Case("somebody's unfinished write", old("prompts/.photo.jpg.0123abcd.tmp")),
    Case("somebody's unfinished write in a cache", old("STALE/g1/.photo.jpg.0123abcd.tmp")),
    Case("an unfinished write of other digits", old(f"prompts/.{HASH}.parquet.0123ABCD.tmp")),
    Case("an unfinished write at another place", old(f"sequences/{TEMPORARY}")),
    Case("an unfinished write too deep", old(f"sequences/words/mine/{TEMPORARY}")),
    Case("an unfinished write in another folder", old(f"photos/{TEMPORARY}")),
    Case("an unfinished write of a moment ago", file(f"prompts/{TEMPORARY}")),
    Case("a folder named like an unfinished write", folder(f"prompts/{TEMPORARY}")),
    Case("a link named like an unfinished write", link(f"prompts/{TEMPORARY}")),
    Case("linked sequences", link("sequences", instead=True)),
    Case("linked sequences of a domain", link("sequences/mine")),
]
UNNAMED = (
    "another name of a shard elsewhere",
    "an unfinished write too deep",
    "an unfinished write in another folder",
    "an unfinished write of other digits",
    "an unfinished write of a moment ago",
    "linked sequences of a domain",
)
"""Cases of which nothing is said: they lie where nothing is looked for, or are our own."""
GONE = [
    Case("an unneeded cache", lambda place: place.stale),
    Case("one without a manifest", lambda place: (place.stale / "manifest.json").unlink()),
    Case("one without an index", lambda place: (place.stale / "g1.index.parquet").unlink()),
    Case("a shard set aside", file(f"USED/g1.aside/{HASH}.parquet")),
    Case("a corrupt shard of an unneeded cache", file(f"STALE/g1/{'f' * 32}.parquet")),
    Case("a quarantine note of an unneeded cache", file(f"STALE/g1.quarantine/{HASH}.json")),
    Case("an unfinished manifest", old("STALE/.manifest.json.0123abcd.tmp")),
    Case("an unfinished shard of a used cache", old(f"USED/g1/{TEMPORARY}")),
    Case("unfinished prompts", old(f"prompts/{TEMPORARY}")),
    Case("unfinished sequences", old(f"sequences/words/{TEMPORARY}")),
    Case("an unfinished dataset", old(f"datasets/{TEMPORARY}")),
    Case("unfinished answers", old(f"synthesis/{HASH}/.{HASH}.json.0123abcd.tmp")),
    Case("unfinished grades", old(f"judgements/{HASH}/.{HASH}.json.0123abcd.tmp")),
    Case("unfinished rejected answers", old(f"rejected/{HASH}/.0-length.parquet.0123abcd.tmp")),
]


def moved(path: str) -> Given:
    def given(place: Place) -> None:
        shutil.move(place.root / path, place.outside / "moved")

    return given


def emptied(path: str) -> Given:
    def given(place: Place) -> None:
        shutil.move(place.root / path, place.outside / "moved")
        (place.root / path).mkdir()

    return given


def models_elsewhere(*made: str) -> Given:
    """A trained run whose checkpoints lie below another root, of which only `made` is there."""

    def given(place: Place) -> None:
        models = place.outside / "models"
        write(place.run / "config.yaml", f"storage: {{root: r, models_root: {models}}}")
        write(place.run / "stages/train.json", "{}")
        for name in made:
            (models / name).mkdir(parents=True)

    return given


def pins(text: str) -> Given:
    return file("runs/quickstart/stages/score.caches.json", text)


def prepared(text: str) -> Given:
    return file("runs/quickstart/prepared.json", text)


def config(text: str) -> Given:
    return file("runs/quickstart/config.yaml", text)


def training(identity: Any) -> Given:
    return file("runs/x/student/training.json", json.dumps(identity))


def swapped_caches(place: Place) -> None:
    shutil.move(place.caches, place.outside / "caches")
    place.caches.symlink_to(place.outside / "caches")


def newest_generation_lost(place: Place) -> None:
    path = place.used / "manifest.json"
    storage.write_json(str(path), storage.read_json(str(path)) | {"generation": 2})
    (place.run / "stages/score.caches.json").unlink()


ODD = "does not hold what polystill writes there"
KEPT_AS_THEY_ARE = [
    Case("runs moved away", moved("runs"), ("holds no prepared run", "bring them back")),
    Case("runs emptied", emptied("runs"), ("holds no prepared run",)),
    Case("runs are a file", lambda p: (moved("runs")(p), write(p.root / "runs")), ("runs",)),
    Case("only a run that was never prepared", emptied("runs/quickstart"), ("no prepared run",)),
    Case("a link to runs that are not mounted", link("runs", "/nowhere", True), ("not there",)),
    Case("a link to a run that is not mounted", link("runs/y", "/nowhere"), ("mount it",)),
    Case("linked checkpoints", link("runs/quickstart/student", "/nowhere"), ("mount it",)),
    Case(
        "linked checkpoints of a later round",
        link("runs/quickstart/rounds/2/student/checkpoints", "/nowhere"),
        ("mount it",),
    ),
    Case(
        "a linked checkpoint",
        link("runs/quickstart/student/checkpoints/step-00000001", "/nowhere"),
        ("mount it",),
    ),
    Case("a models_root that is not there", models_elsewhere(), ("models", "mount it")),
    Case("a disk that is not mounted", models_elsewhere("."), ("is not there", "empty folder")),
    Case("linked caches", swapped_caches, ("is a link to", "another storage root")),
    Case("linked caches to nowhere", link("caches", "/nowhere", True), ("is a link to",)),
    Case("pins cut", pins('{"words'), ("not valid JSON",)),
    Case("pins are a list", pins("[]"), (ODD,)),
    Case("pins hold text", pins('{"words-1": "1"}'), (ODD, "words-1: ")),
    Case("pins hold true", pins('{"words-1": true}'), (ODD, "words-1: ")),
    Case("pins hold zero", pins('{"words-1": 0}'), (ODD, "words-1: ")),
    Case("a preparation without caches", prepared("{}"), (ODD, "scoring_recipes")),
    Case("a preparation that is a list", prepared("[]"), (ODD,)),
    Case("a preparation of odd recipes", prepared('{"scoring_recipes": [1]}'), (ODD,)),
    Case("a preparation of odd identities", prepared('{"scoring_recipes": {"a": 1}}'), (ODD,)),
    Case("a config that is gone", lambda p: (p.run / "config.yaml").unlink(), ("has lost",)),
    Case("a config that is a pipe", piped_config, ("cannot read", "pipe")),
    Case("a nested preparation", prepared("[" * 200_000), ("nested too deeply",)),
    Case("a preparation of many digits", prepared("9" * 5000), ("digits",)),
    Case("a config that is a list", config("[]"), (ODD,)),
    Case("a config without storage", config("name: x"), (ODD, "storage")),
    Case("a config of odd storage", config("storage: here"), (ODD,)),
    Case("a config that is no YAML", config("storage: {"), (ODD, "line 1")),
    Case("a config with a date that is none", config("storage: 2001-99-99"), (ODD,)),
    Case("a training that is a list", training([]), (ODD,)),
    Case("a training of odd identity", training({"identity": []}), (ODD, "identity: ")),
    Case("a training of odd caches", training({"identity": {"caches": [1]}}), (ODD,)),
    Case("a training of an odd cache", training({"identity": {"caches": {"a": 1}}}), (ODD,)),
    Case(
        "a training of an odd generation",
        training({"identity": {"caches": {"a": {"fingerprint": "f", "generation": None}}}}),
        (ODD, "identity.caches.a.generation: "),
    ),
    Case("a used cache's manifest is a list", file("USED/manifest.json", "[]"), (ODD,)),
    Case("a used cache's manifest is cut", file("USED/manifest.json", "{"), ("not valid JSON",)),
    Case("a generation in words", file("USED/manifest.json", '{"generation": "x"}'), (ODD,)),
    Case("the newest generation is lost", newest_generation_lost, ("generation 2",)),
    Case(
        "a run's name is no UTF-8",
        lambda p: os.mkdir(os.fsencode(p.root) + b"/runs/\xe9"),
        ("\\xe9",),
    ),
]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a scored run, and the cache of a run that is gone."""
    root = tmp_path_factory.mktemp("template") / "root"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("jobs.stages.score.run_pools", FakePools())
        names = []
        for name, changes in (("quickstart", []), ("gone", ["teachers.words.vllm.dtype=bfloat16"])):
            run = FabricatedRun(root, name, changes)
            run.prepare()
            run.write_answers(0, 2)
            run.score()
            names.append(set(storage.read_json(run.layout.pins)))
    shutil.rmtree(root / "runs/gone")
    (root / "prompts").mkdir()
    storage.write_json(str(root.parent / "stale.json"), sorted(names[1] - names[0]))
    return root


@pytest.fixture
def place(template: Path, tmp_path: Path) -> Place:
    return Place(tmp_path, template)


def collect(place: Place) -> str:
    return collect_garbage(FabricatedRun(place.root).config, False, False)


@pytest.mark.parametrize("case", LEFT, ids=str)
def test_what_is_not_ours_is_left_and_named(case: Case, place: Place) -> None:
    kept = case.given(place)
    before = place.files
    said = check_answer(case, lambda: collect(place))
    after = place.files
    assert after == {path: content for path, content in before.items() if path in after}
    assert os.path.lexists(kept)
    assert all(path in after for path in before if path.startswith((str(kept), str(place.outside))))
    name = str(kept.relative_to(place.root)) if place.root in kept.parents else ""
    named = [line for line in said.splitlines() if line.startswith("not ours, left: ")]
    lines = " ".join(named)
    if case.name in UNNAMED:
        assert not named
    else:
        assert any(str(place.root / "/".join(name.split("/")[:n])) in lines for n in (2, 3, 4, 1))


@pytest.mark.parametrize("case", GONE, ids=str)
def test_what_is_ours_and_nobody_needs_goes(case: Case, place: Place) -> None:
    made = case.given(place)
    used = {path: content for path, content in place.files.items() if "quickstart" in path}
    assert check_answer(case, lambda: collect(place)).endswith("removed")
    assert not place.stale.exists() and not (made and made.exists())
    assert used.items() <= place.files.items()
    assert len(list(place.used.glob("g1/*.parquet"))) == 2
    assert collect(place) == f"nothing to remove below {place.root}"


@pytest.mark.parametrize("case", KEPT_AS_THEY_ARE, ids=str)
def test_nothing_goes_while_a_need_is_unknown(case: Case, place: Place) -> None:
    case.given(place)
    before = place.files
    check_answer(case, lambda: collect(place))
    assert place.files == before


def test_a_run_whose_checkpoints_are_mounted_is_no_hindrance(place: Place) -> None:
    models_elsewhere("runs/quickstart")(place)
    assert collect(place).endswith("removed") and place.used.exists()


def test_without_a_terminal_it_lists_and_fails(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    before = place.files
    arguments = ["cache", "gc", *FabricatedRun(place.root).arguments]
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert "no run names this cache" in printed.out and "give --yes" in printed.err
    assert place.files == before
    assert main([*arguments, "--dry-run"]) == 0 and place.files == before
    assert main([*arguments, "--yes"]) == 0 and not place.stale.exists()


@pytest.mark.parametrize(
    ("answer", "goes"),
    [("y", True), (" YES ", True), ("", False), ("n", False), ("yep", False), (EOFError(), False)],
    ids=repr,
)
def test_only_yes_removes(
    place: Place, monkeypatch: pytest.MonkeyPatch, answer: str | EOFError, goes: bool
) -> None:
    def answered(question: str) -> str:
        assert question.startswith("remove these") and question.endswith("[y/N] ")
        if isinstance(answer, EOFError):
            raise answer
        return answer

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", answered)
    assert main(["cache", "gc", *FabricatedRun(place.root).arguments]) == 0
    assert place.stale.exists() != goes


def test_what_becomes_needed_during_the_question_stays(place: Place) -> None:
    def needed_meanwhile(text: str, question: str) -> bool:
        storage.write_json(
            str(place.root / "runs/new/stages/score.caches.json"), {place.stale.name: 1}
        )
        shutil.copy(place.run / "config.yaml", place.root / "runs/new")
        write(place.used / f"g1.aside/{HASH}.parquet")
        return True

    before = place.files
    assert (
        collect_garbage(FabricatedRun(place.root).config, False, False, needed_meanwhile)
        == "removed 0 files"
    )
    assert before.items() <= place.files.items(), "nor does what was not listed go"


def test_a_folder_that_becomes_a_link_is_not_entered(place: Place) -> None:
    from pipeline.cache_care.entries import remove_file
    from pipeline.errors import StorageError

    shutil.move(place.stale / "g1", place.outside / "g3")
    (place.stale / "g1").symlink_to(place.outside / "g1")
    with pytest.raises(StorageError, match="cannot remove"):
        remove_file(str(place.root), f"caches/{place.stale.name}/g1/{HASH}.parquet")
    assert (place.outside / "g1" / f"{HASH}.parquet").read_text() == "precious"
