from loraweave.extensions.routers.by_sequence import BySequence as BySequence
from loraweave.extensions.routers.routers.adapter_fusion import OutputAttention as OutputAttention
from loraweave.extensions.routers.routers.lorauter import expert_losses as expert_losses
from loraweave.extensions.routers.to_peft import save_as_peft as save_as_peft
