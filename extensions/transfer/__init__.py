"""How can an adapter move to another base, and a thousand fit in memory? Layers are matched; adapters share factors.

`transfer` carries an adapter to another base, layer by layer, teaches it the old answers on request, and predicts how much
of it survives. `distil_adapter` teaches another family what an adapter answers, `distil_prompt` what a prompt says;
`JointPool` keeps many adapters as bases that all share and small middles of their own. They need no other package.
"""

from loraweave.extend import face

_MODULES = {
    "carrying": "transfer",
    "families": "distil_adapter",
    "joint_pool": "JointPool JointReport",
    "prompts": "distil_prompt",
}
__getattr__, __dir__, __all__ = face(__name__, _MODULES)
