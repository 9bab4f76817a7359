"""Stage 5: writes the trained models as Hugging Face folders, checked against the training."""

from __future__ import annotations

from jobs.bookkeeping.stage_records import (
    stage_key,
)
from jobs.stages.inputs import Outcome, scored_of
from pipeline.config.run import Config
from pipeline.layout import Layout
from pipeline.run.training_spec import training_specs


def export(config: Config, layout: Layout) -> Outcome:
    from jobs.stages.holdout import run_on_evaluation_resources
    from students.export import export_student

    prepared, dataset = scored_of(config, layout)
    figures = {
        job.student: run_on_evaluation_resources(
            config, export_student, job, layout.export_folder(job.student)
        )
        for job in training_specs(config, layout, prepared, dataset)
    }
    return {
        "key": stage_key(config, layout, prepared, "export"),
        "figures": figures,
        "summary": "; ".join(
            f"{found['folder']} (at most {found['largest_difference_nats']:.1e} nats from training)"
            for found in figures.values()
        ),
    }
