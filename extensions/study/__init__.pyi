from loraweave.extensions.study.harness import evaluate_harness as evaluate_harness
from loraweave.extensions.study.results import Figure as Figure
from loraweave.extensions.study.results import StudyResults as StudyResults
from loraweave.extensions.study.running import study as study
