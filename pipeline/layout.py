"""Every path, once. All are strings below `storage.root`: a local folder or a URI."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.storage import join


@dataclass(frozen=True)
class CacheLayout:
    """The folder of one cache under one recipe, and one generation in it."""

    folder: str
    generation: int

    @property
    def manifest(self) -> str:
        return join(self.folder, "manifest.json")

    @property
    def shards_folder(self) -> str:
        return join(self.folder, f"g{self.generation}")

    @property
    def index(self) -> str:
        return join(self.folder, f"g{self.generation}.index.parquet")

    @property
    def canary(self) -> str:
        """What the first engine that wrote to the generation said of the canary."""
        return join(self.folder, f"g{self.generation}.canary.json")

    @property
    def quarantine(self) -> str:
        return join(self.folder, f"g{self.generation}.quarantine")

    @property
    def name(self) -> str:
        """The folder's own name: teacher and recipe."""
        return self.folder.rsplit("/", 1)[-1]

    @property
    def regeneration(self) -> str:
        """What was asked of an unfinished forced regeneration; gone once it is complete."""
        return join(self.folder, f"g{self.generation}.regeneration.json")

    @property
    def aside(self) -> str:
        """Corrupt shards, out of the way of their successors."""
        return join(self.folder, f"g{self.generation}.aside")

    def quarantine_record(self, sequence_id: str) -> str:
        return join(self.quarantine, f"{sequence_id}.json")

    def shard(self, digest: str) -> str:
        return join(self.shards_folder, f"{digest}.parquet")


@dataclass(frozen=True)
class Layout:
    """Paths of a storage root, and of one run in it.

    Attributes:
        run: its folder below `runs/`; a later round's is `<name>/rounds/<number>`.
        models_root: file system folder for checkpoints and exports, where `root` is a URI.
    """

    root: str
    run: str
    models_root: str | None = None

    @property
    def runs_folder(self) -> str:
        return join(self.root, "runs")

    @property
    def caches_folder(self) -> str:
        return join(self.root, "caches")

    @property
    def run_folder(self) -> str:
        return join(self.runs_folder, self.run)

    def of_round(self, number: int) -> Layout:
        """Of one of the run's rounds: the first one has the run's own folder."""
        below = "" if number == 1 else f"/rounds/{number}"
        return replace(self, run=f"{self.run}{below}")

    @property
    def resolved_config(self) -> str:
        return join(self.run_folder, "config.yaml")

    @property
    def prepared(self) -> str:
        return join(self.run_folder, "prepared.json")

    def stage_record(self, stage: str) -> str:
        return join(self.run_folder, "stages", f"{stage}.json")

    def unended_attempts(self, stage: str) -> str:
        """How often a stage was begun since its record and has not ended."""
        return join(self.run_folder, "stages", f"{stage}.unended.json")

    @property
    def pins(self) -> str:
        """The generations of the caches that the run uses."""
        return join(self.run_folder, "stages", "score.caches.json")

    @property
    def learned_weights(self) -> str:
        return join(self.run_folder, "learned_weights.json")

    @property
    def report_json(self) -> str:
        return join(self.run_folder, "report.json")

    @property
    def report_html(self) -> str:
        return join(self.run_folder, "report.html")

    def answers(self, model: str) -> str:
        """What a model answered to the hold-out prompts."""
        return join(self.run_folder, "answers", f"{model}.jsonl")

    def job_log(self, identifier: str) -> str:
        """Of a job whose head has ended."""
        return join(self.run_folder, "logs", f"{identifier}.log")

    @property
    def models_folder(self) -> str:
        """The run's folder on a file system."""
        return join(self.models_root or self.root, "runs", self.run)

    def training_folder(self, student: str) -> str:
        """Checkpoints, metrics and TensorBoard events of `student` or `twin`."""
        return join(self.models_folder, student)

    def metrics(self, student: str) -> str:
        """A line for every step that was logged."""
        return join(self.training_folder(student), "metrics.jsonl")

    def final_weights(self, student: str) -> str:
        return join(self.training_folder(student), "final", "weights.safetensors")

    def probe(self, student: str) -> str:
        """Log-probabilities that the export of the final weights must reproduce."""
        return join(self.training_folder(student), "final", "probe.json")

    def training_summary(self, student: str) -> str:
        """Written last of all: its existence means that the training is complete."""
        return join(self.training_folder(student), "training.json")

    def export_folder(self, student: str) -> str:
        return join(self.models_folder, "export", student)

    def lock(self, work: str) -> str:
        """The file that one process at a time holds while it works in the run's folder."""
        return join(self.models_folder, f"{work}.lock")

    def prompts(self, digest: str) -> str:
        return join(self.root, "prompts", f"{digest}.parquet")

    def sequences_folder(self, domain: str) -> str:
        return join(self.root, "sequences", domain)

    def synthesis_folder(self, recipe: str) -> str:
        return join(self.root, "synthesis", recipe)

    def rejected(self, digest: str, name: str) -> str:
        """Answers that are not trained on, by who dropped them; for people."""
        return join(self.root, "rejected", digest, f"{name}.parquet")

    def judgements(self, recipe: str, name: str = "") -> str:
        """The folder of a judge's grades, or a file in it."""
        return join(self.root, "judgements", recipe, *([name] if name else []))

    def endpoint_canary(self, digest: str) -> str:
        """What an endpoint said of the canary when it was first asked."""
        return join(self.root, "endpoints", f"{digest}.json")

    @property
    def datasets_folder(self) -> str:
        return join(self.root, "datasets")

    def dataset(self, digest: str) -> str:
        return join(self.datasets_folder, f"{digest}.parquet")

    @property
    def weight_hashes(self) -> str:
        return join(self.root, "weight_hashes.json")

    def cache(self, name: str, fingerprint: str, generation: int = 1) -> CacheLayout:
        """A cache: distributions under a teacher's name, hidden states under `hidden_states_of`."""
        return CacheLayout(join(self.caches_folder, f"{name}-{fingerprint[:16]}"), generation)
