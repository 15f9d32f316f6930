"""How can an adapter move to another base, and a thousand fit in memory? Layers are matched; adapters share factors.

`transfer` carries an adapter to another base, layer by layer, teaches it the old answers on request, and predicts how much
of it survives. `distil_adapter` teaches another family what an adapter answers, `distil_prompt` what a prompt says;
`JointPool` keeps many adapters as bases that all share and small middles of their own. They need no other package.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.transfer.carrying import transfer
    from loraweave.extensions.transfer.families import distil_adapter
    from loraweave.extensions.transfer.joint_pool import JointPool, JointReport
    from loraweave.extensions.transfer.prompts import distil_prompt
else:
    _MODULES = {
        "carrying": "transfer",
        "families": "distil_adapter",
        "joint_pool": "JointPool JointReport",
        "prompts": "distil_prompt",
    }
    __getattr__ = lazy(__name__, {f"{__name__}.{module}": names for module, names in _MODULES.items()})

__all__ = ["JointPool", "JointReport", "distil_adapter", "distil_prompt", "transfer"]
