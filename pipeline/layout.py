"""Paths of all files, each defined once: strings below `storage.root`, a local folder or a URI."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.storage import join


@dataclass(frozen=True)
class CacheLayout:
    """Paths of one generation of one cache.

    Attributes:
        folder: folder of the cache, named by teacher and fingerprint.
        generation: number of the generation; a forced regeneration writes the next one.
    """

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
        """Log-probabilities of the canary under the first engine that wrote to the generation."""
        return join(self.folder, f"g{self.generation}.canary.json")

    @property
    def quarantine(self) -> str:
        return join(self.folder, f"g{self.generation}.quarantine")

    @property
    def name(self) -> str:
        """Name of the folder: teacher and fingerprint."""
        return self.folder.rsplit("/", 1)[-1]

    @property
    def regeneration(self) -> str:
        """Request of an unfinished forced regeneration; removed once that is complete."""
        return join(self.folder, f"g{self.generation}.regeneration.json")

    @property
    def aside(self) -> str:
        """Folder of corrupt shards, out of the way of the shards that replace them."""
        return join(self.folder, f"g{self.generation}.aside")

    def quarantine_record(self, sequence_id: str) -> str:
        """Quarantine note of a sequence that the teacher could not score."""
        return join(self.quarantine, f"{sequence_id}.json")

    def shard(self, digest: str) -> str:
        return join(self.shards_folder, f"{digest}.parquet")


@dataclass(frozen=True)
class Layout:
    """Paths of a storage root and of one run in it.

    Attributes:
        root: local folder or URI that all runs share.
        run: folder of the run below `runs/`; `<name>/rounds/<number>` in a later round.
        models_root: folder for checkpoints and exports if `root` is a URI.
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
        """Layout of one round of the run; round 1 has the run's own folder."""
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
        """Counter of the attempts of a stage that began after its stage record and did not end."""
        return join(self.run_folder, "stages", f"{stage}.unended.json")

    @property
    def pins(self) -> str:
        """Cache generations that the run uses, pinned before its first row is scored."""
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
        """Answers of a model to the hold-out prompts."""
        return join(self.run_folder, "answers", f"{model}.jsonl")

    def job_log(self, identifier: str) -> str:
        """Log of a Ray job, kept after the local Ray head has ended."""
        return join(self.run_folder, "logs", f"{identifier}.log")

    @property
    def models_folder(self) -> str:
        """Folder of the run on a file system, for checkpoints and exports."""
        return join(self.models_root or self.root, "runs", self.run)

    def training_folder(self, student: str) -> str:
        """Checkpoints, metrics and TensorBoard events of `student` or `twin`."""
        return join(self.models_folder, student)

    def metrics(self, student: str) -> str:
        """Training metrics, one JSON line for each logged step."""
        return join(self.training_folder(student), "metrics.jsonl")

    def final_weights(self, student: str) -> str:
        return join(self.training_folder(student), "final", "weights.safetensors")

    def probe(self, student: str) -> str:
        """Log-probabilities that the exported model must reproduce."""
        return join(self.training_folder(student), "final", "probe.json")

    def training_summary(self, student: str) -> str:
        """Summary of a training, written last: if it exists, the training is complete."""
        return join(self.training_folder(student), "training.json")

    def export_folder(self, student: str) -> str:
        return join(self.models_folder, "export", student)

    def lock(self, work: str) -> str:
        """Lock file that one process at a time holds while it works in the run's folder."""
        return join(self.models_folder, f"{work}.lock")

    def prompts(self, digest: str) -> str:
        return join(self.root, "prompts", f"{digest}.parquet")

    def sequences_folder(self, domain: str) -> str:
        return join(self.root, "sequences", domain)

    def synthesis_folder(self, digest: str) -> str:
        """Folder of the answered shards under the synthesis identity of that digest."""
        return join(self.root, "synthesis", digest)

    def rejected(self, digest: str, name: str) -> str:
        """Answers that are not trained on, for people to read; `name` tells filter or prompt shard.

        Args:
            digest: names the folder, by dataset and filters or by synthesis identity.
        """
        return join(self.root, "rejected", digest, f"{name}.parquet")

    def judgements(self, digest: str, name: str = "") -> str:
        """Folder of a judge's grades under an identity, or the file `name` in it."""
        return join(self.root, "judgements", digest, *([name] if name else []))

    def endpoint_canary(self, digest: str) -> str:
        """Log-probabilities of the canary from the first start of an endpoint."""
        return join(self.root, "endpoints", f"{digest}.json")

    def endpoint_batches(self, digest: str) -> str:
        """Folder with a record of every batch that an endpoint was sent."""
        return join(self.root, "endpoints", f"{digest}-batches")

    @property
    def datasets_folder(self) -> str:
        return join(self.root, "datasets")

    def dataset(self, digest: str) -> str:
        return join(self.datasets_folder, f"{digest}.parquet")

    @property
    def weight_hashes(self) -> str:
        return join(self.root, "weight_hashes.json")

    def cache(self, name: str, fingerprint: str, generation: int = 1) -> CacheLayout:
        """Layout of a teacher's cache of distributions or of hidden states.

        Args:
            name: the teacher, or `hidden_states_of(teacher)` for hidden states.
            fingerprint: digest of the cache's identity.
        """
        return CacheLayout(join(self.caches_folder, f"{name}-{fingerprint[:16]}"), generation)
