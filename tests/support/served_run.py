"""A run whose teacher is a server in the test's process, for clusters of several nodes.

It asks for nodes with the resource `teacher_node`, and it needs no engine: answers and rows take
milliseconds, unless the server keeps its requests waiting.
"""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from tests.support.caches import cached_rows, dataset, shards
from tests.support.command_line import (
    RunningCommand,
    polystill,
    start_polystill,
    token_environment,
)
from tests.support.endpoints import SERVED, FakeVllm, Json, Response
from tests.support.tiny_models import save_tiny_llama
from tests.support.tokenizers_for_tests import SPECIAL, save_tokenizer

TEACHER, RUN = "served", "nodes"
NUM_PROMPTS, PROMPTS_PER_SHARD = 120, 16
LETTERS = "abcdefghijklmnop"
CONFIG = {
    "name": RUN,
    "seed": 1,
    "storage": {"root": "./output"},
    "prompts": {"sources": [{"path": "./prompts.jsonl"}], "holdout_fraction": 0.1},
    "teachers": {
        TEACHER: {
            "endpoint": {
                "model": SERVED,
                "api": "vllm",
                "tokenizer": "./student",
                "dtype": "float32",
                "max_model_len": 64,
            },
            "model_identity": "a hash",
            "resources": {"num_cpus": 0.5, "custom": {"teacher_node": 0.5}},
        }
    },
    "synthesis": {
        "recipes": [
            {
                "type": "answer",
                "by": "every_teacher",
                "sampling": {"temperature": 0.7, "max_tokens": 8},
            }
        ],
        "prompts_per_shard": PROMPTS_PER_SHARD,
    },
    "scoring": {"num_logprobs": 16, "selection": {"type": "top_k", "max_entries": 5}},
    "combine": {
        "method": "mixture",
        "weights": {"type": "confidence", "per": "token", "temperature": 1.0},
    },
    "student": {"model": "./student", "initialization": "random"},
    "training": {
        "losses": [{"type": "forward_kl", "weight": 1.0}],
        "steps": 1,
        "sequences_per_step": 1,
        "tokens_per_micro_batch": 64,
        "learning_rate": 0.001,
        "warmup_steps": 0,
        "evaluate_every_steps": 1,
        "checkpoint_every_steps": 1,
    },
    "evaluation": {"sampling": {"temperature": 0.0, "max_tokens": 8}},
    "cluster": {"autoscaling": True},  # what is lost comes back
}


@dataclass
class HeldServer:
    """The teacher's server, which can keep requests of one kind waiting.

    Attributes:
        held_back: which requests wait, by path and body.
        is_open: set while nothing waits.
        has_held: set once a request has waited.
    """

    url: str = ""
    held_back: Callable[[str, Json], bool] = lambda path, body: False
    is_open: threading.Event = field(default_factory=threading.Event)
    has_held: threading.Event = field(default_factory=threading.Event)
    fake: FakeVllm = field(default_factory=FakeVllm)

    def __post_init__(self) -> None:
        self.is_open.set()

    def __call__(self, path: str, body: Json) -> Response:
        if not self.is_open.is_set() and self.held_back(path, body):
            self.has_held.set()
            self.is_open.wait()
        return self.fake(path, body)

    @contextmanager
    def holding(self, held_back: Callable[[str, Json], bool]) -> Iterator[None]:
        """Keeps requests waiting until `is_open` is set, or until the context ends."""
        self.held_back = held_back
        self.has_held.clear()
        self.is_open.clear()
        try:
            yield
        finally:
            self.is_open.set()


@dataclass(frozen=True)
class ServedRun:
    """A run and its storage root, on a cluster that has its job server elsewhere.

    Attributes:
        config: the config's file; several runs may have one.
        root: storage root.
        address: URL of the job server.
        token: token of the cluster.
        within: command behind which each command of the run is written, such as `ip netns exec`.
    """

    config: Path
    root: Path
    address: str
    token: str
    within: tuple[str, ...] = ()

    def start(self, *command: str) -> RunningCommand:
        """Starts a command with further overrides, such as `submit score name=other`."""
        words = [word for word in command if "=" not in word]
        overrides = [word for word in command if "=" in word]
        return start_polystill(
            self.root.with_name(f"{self.root.name}-{'-'.join(words)}"),
            *(*words, self.config, f"storage.root={self.root}", *overrides),
            *("--address", self.address),
            env=token_environment(self.token),
            within=self.within,
        )

    def finish(self, *command: str, seconds: float = 180) -> str:
        """Runs a command to its end, which must be a success; returns its output."""
        running = self.start(*command)
        code = running.process.wait(timeout=seconds)
        assert code == 0, running.printed()
        return running.printed()

    def prepare(self) -> None:
        """Runs the first stage in a process of this machine."""
        done = polystill("stage", "prepare", self.config, f"storage.root={self.root}")
        assert done.returncode == 0, done.stderr

    def copied(self, name: str) -> ServedRun:
        """The same run, as far as it is, in a storage root beside this one."""
        copy = self.root.with_name(name)
        shutil.copytree(self.root, copy)
        return replace(self, root=copy)

    def assert_every_sequence_has_one_row(self) -> None:
        wanted = dataset(self.root, RUN)
        assert len(wanted) == NUM_PROMPTS
        assert cached_rows(shards(self.root, TEACHER)).keys() == wanted.keys()


def write_config(folder: Path, url: str) -> Path:
    """Writes prompts, a tiny student and the config of a teacher at a URL; returns its path."""
    save_tiny_llama(folder / "student", vocabulary=len(SPECIAL) + len(LETTERS))
    save_tokenizer(folder / "student", tokens=[*SPECIAL, *LETTERS])
    words = random.Random(0)
    prompts = [
        {"text": "".join(words.choices(LETTERS, k=12)), "domain": "letters"}
        for _ in range(NUM_PROMPTS)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    config = json.loads(json.dumps(CONFIG))
    config["storage"]["shared_roots"] = [str(folder)]
    config["teachers"][TEACHER]["endpoint"]["url"] = url
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
