"""Errors that a user can act on. Every message says what, which values, and what to do next."""


class DistillationError(ValueError):
    """Base of all errors for users; the command line prints the message alone."""


class ConfigError(DistillationError):
    """The configuration is wrong, contradictory or cannot be honoured."""


class PromptError(DistillationError):
    """A prompt file has a bad line; the message names the file and the line."""


class StorageError(DistillationError):
    """Reading or writing storage failed: a full disk, a missing path, a permission."""


class StoreUnreachableError(StorageError):
    """An object store did not answer, or broke off; a later try may succeed."""


class CorruptFileError(StorageError):
    """A file is there and is not what was written: truncated, or some of its bits have changed."""


class CacheError(DistillationError):
    """A cache shard, index or manifest is missing, corrupt or does not fit the request."""


class CorruptShardError(CacheError):
    """A cache shard is truncated or was changed after it was written."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return (
            f"the cache shard {self.path} is corrupt: {self.reason}. `polystill cache regenerate "
            "CONFIG` sets it aside and scores its sequences again; `polystill cache verify CONFIG` "
            "looks for others."
        )


class VocabularyMismatchError(DistillationError):
    """Tokenizers or chat templates of teachers and student disagree."""


class TeacherError(DistillationError):
    """A teacher's engine failed or returned rows that break an invariant."""


class FilterError(DistillationError):
    """The filters of the synthesis leave nothing to train on or to evaluate."""


class TrainingError(DistillationError):
    """Training cannot start or resume."""


class ClusterError(DistillationError):
    """The Ray cluster cannot be reached, refused the token, or lacks resources."""
