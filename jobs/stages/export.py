"""Stage 5: writes the trained students as Hugging Face folders, checked against the training."""

from __future__ import annotations

from jobs.bookkeeping.stage_records import StageRecord, stage_key
from jobs.stages.inputs import dataset_to_train_on
from pipeline.run.prepared_run import Run
from pipeline.run.training_spec import training_specs


def export(run: Run) -> StageRecord:
    """Exports every student of the run.

    Raises:
        ConfigError: the score stage has not finished.
        ClusterError: the cluster has no node for the evaluation's resources.
        TrainingError: an exported student is not the trained one.
    """
    from jobs.stages.holdout import run_on_evaluation_resources
    from students.export.folder import export_student

    summaries = {
        spec.student: run_on_evaluation_resources(
            run.config, export_student, spec, run.layout.export_folder(spec.student)
        )
        for spec in training_specs(run, dataset_to_train_on(run))
    }
    return StageRecord(
        key=stage_key(run, "export"),
        figures=summaries,
        summary="; ".join(
            f"{s['folder']} (weights equal to the trained ones; log-probabilities "
            f"{s['agreement']['mean_difference']:.1e} nats from training, noise "
            f"{s['agreement']['noise']:.1e})"
            for s in summaries.values()
        ),
    )
