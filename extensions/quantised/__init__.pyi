from loraweave.extensions.quantised.losses import LogitsLoss as LogitsLoss
from loraweave.extensions.quantised.losses import differences as differences
from loraweave.extensions.quantised.losses import logits_loss as logits_loss
