from loraweave.extensions.expert_training.feeds import feed_of as feed_of
from loraweave.extensions.expert_training.grouping import clusters as clusters
from loraweave.extensions.expert_training.identity import loss_identity as loss_identity
from loraweave.extensions.expert_training.steps import ExpertSettings as ExpertSettings
from loraweave.extensions.expert_training.trainer import fit as fit
