"""A prepared run: everything that a stage needs to know about the run that it works for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.cache.generations import generation_in_use, pinned_generations
from pipeline.cache.kinds import holdout_identities, holds_hidden_states
from pipeline.combine.learned import learned_weights, with_learned
from pipeline.config.combine import CombineConfig
from pipeline.config.rounds import layout_of
from pipeline.config.run import Config
from pipeline.errors import ConfigError
from pipeline.layout import CacheLayout, Layout
from pipeline.run.identities import cache_layout
from pipeline.run.preparation import Prepared, load_prepared


@dataclass(frozen=True)
class Run:
    """A run of a user, in one of its rounds, after its prepare stage.

    Attributes:
        config: config of the round.
        layout: paths of the round.
        prepared: what the prepare stage has written down.
    """

    config: Config
    layout: Layout
    prepared: Prepared

    @staticmethod
    def open(config: Config) -> Run:
        """Opens the run of a config.

        Raises:
            ConfigError: the run is not prepared, or its inputs have changed since.
        """
        run = Run.find(config)
        if run is None:
            raise ConfigError(
                f"run {config.name} is not prepared for this config: submit the stage prepare first"
            )
        return run

    @staticmethod
    def find(config: Config) -> Run | None:
        """Opens the run of a config; None if it is not prepared for this config."""
        layout = layout_of(config)
        prepared = load_prepared(config, layout)
        return None if prepared is None else Run(config, layout, prepared)

    def cache_layouts(self) -> dict[str, CacheLayout]:
        """Folders of all caches that the run trains on, by cache name, in the generations that it
        uses.
        """
        return self._layouts(self.prepared.cache_identities)

    def holdout_layouts(self) -> dict[str, CacheLayout]:
        """Folders of the wide caches of the hold-out split, by cache name; none where the caches
        that are trained on serve the report.
        """
        return self._layouts(holdout_identities(self.prepared.cache_identities))

    def all_layouts(self) -> dict[str, CacheLayout]:
        """Folders of all caches of the run, by cache name."""
        return self.cache_layouts() | self.holdout_layouts()

    def began_without(self, cache: CacheLayout) -> bool:
        """Whether the run has pinned its caches before it knew of this one, as runs of an earlier
        version have.
        """
        pins = pinned_generations(self.layout)
        return bool(pins) and cache.name not in pins

    def _layouts(self, identities: Mapping[str, dict[str, Any]]) -> dict[str, CacheLayout]:
        return {
            name: generation_in_use(self.layout, cache_layout(self.layout, name, identity))
            for name, identity in identities.items()
        }

    def distribution_layouts(self) -> dict[str, CacheLayout]:
        """Folders of the caches that hold distributions, by teacher."""
        caches = self.cache_layouts()
        return {name: cache for name, cache in caches.items() if not holds_hidden_states(name)}

    def combine(self) -> CombineConfig:
        """Settings of the combination, with learned weights replaced by the weights themselves.

        Raises:
            ConfigError: the weights are learned, and the score stage has not finished.
        """
        return with_learned(self.config.combine, learned_weights(self.config.combine, self.layout))
