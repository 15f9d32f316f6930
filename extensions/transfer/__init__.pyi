from loraweave.extensions.transfer.carrying import transfer as transfer
from loraweave.extensions.transfer.families import distil_adapter as distil_adapter
from loraweave.extensions.transfer.joint_pool import JointPool as JointPool
from loraweave.extensions.transfer.joint_pool import JointReport as JointReport
from loraweave.extensions.transfer.prompts import distil_prompt as distil_prompt
