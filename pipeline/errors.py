"""Errors that a user can act on: each message names the problem, the values and the remedy."""


class DistillationError(ValueError):
    """Base of all errors for users; the command line prints the message without a traceback."""


class ConfigError(DistillationError):
    """The configuration is wrong, contradictory or cannot be honoured."""


class PromptError(DistillationError):
    """A prompt file has a bad line; the message names the file and the line."""


class StorageError(DistillationError):
    """Reading or writing storage failed: a full disk, a missing path, a missing permission."""


class StoreUnreachableError(StorageError):
    """An object store did not answer or dropped the connection; another try may succeed."""


class CorruptFileError(StorageError):
    """A file exists but does not hold what was written: it is truncated or bits have changed."""


class CacheError(DistillationError):
    """A cache shard, index or manifest is missing, corrupt or does not fit the request."""


class CorruptShardError(CacheError):
    """A cache shard is truncated or was changed after it was written.

    Attributes:
        path: path or URI of the shard.
        reason: description of the damage, for the message.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both arguments, so that the error pickles
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return (
            f"the cache shard {self.path} is corrupt: {self.reason}; `polystill cache regenerate "
            "CONFIG` sets it aside and scores its sequences again, `polystill cache verify CONFIG` "
            "looks for other corrupt shards"
        )


class VocabularyMismatchError(DistillationError):
    """The tokenizers or chat templates of teachers and student disagree."""


class TeacherError(DistillationError):
    """A teacher failed, or returned rows that break an invariant."""


class FilterError(DistillationError):
    """The filters leave nothing to train on or to evaluate."""


class TrainingError(DistillationError):
    """Training cannot start or resume."""


class ClusterError(DistillationError):
    """The Ray cluster cannot be reached, refused the token, or lacks resources."""
