"""Trainings: jobs that share a pass, their rows and checkpoints, and the descent of everything that learns."""

from loraweave.registry import face

_MODULES = {
    "common.descent": (
        "Descent TrainingState backward caller_randomness checkpoint_folder descend drop_state load_state save_state "
        "save_tensors seeded tensor_bytes warmed_cosine with_seed"
    ),
    "common.process": "launched_processes",
    "composer.experts.together": "ExpertJob require_shareable",
    "composer.train.adapters": "Apart read_tasks require_plain require_startable require_texts target_layers training_rows",
    "composer.train.jobs": (
        "JobKind LoraJob LoraJobs LoraSettings LowRank Pace SharedPass Stream TrainingJob given_factors job_losses "
        "new_factors"
    ),
    "composer.train.progress": "KeptState TrainingProgress TrainingSettings checkpointed_blocks",
    "composer.train.rows": "HeldOut Judging Owners RowReader Texts TrainingRow is_empty",
    "composer.train.shared": "SharedTraining StepMemory",
    "composer.train.state": "JobReport JobSize PlannedJob SharedReport TrainedAdapters load_adapter save_adapter",
}
__getattr__, __dir__, __all__ = face(__name__, _MODULES, "loraweave")
