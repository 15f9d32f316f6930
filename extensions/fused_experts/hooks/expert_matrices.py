"""Live mixtures of a module that has all experts' weights in parameters of three axes: it runs them one by one."""

from collections.abc import Iterator, Sequence

from torch import nn

from loraweave.extend import TargetLayer
from loraweave.extend.live import Handle, LiveHook, LiveModel
from loraweave.extensions.fused_experts.running import ExpertsForward, computes_as_known, watched


class ExpertMatrices(LiveHook):
    """The hook that replaces the forward of a module of fused experts; `watched` shows the products of its experts."""

    watched = staticmethod(watched)

    @classmethod
    def runs_experts(cls, module: nn.Module) -> bool:
        """Return True if the module computes like a known module of fused experts."""
        return computes_as_known(module)

    def take_experts(self, live: LiveModel, module: nn.Module, layers: Sequence[TargetLayer]) -> Iterator[Handle]:
        """Let the module's forward add the updates of these experts; yield handles that undo each change."""
        running = getattr(module.forward, "__self__", None)
        if not isinstance(running, ExpertsForward) or running.live is not live:
            running = ExpertsForward(module, live)
            yield running
            path, forward = layers[0].path, running
            owner = live.model.get_submodule(path.rpartition(".")[0])
            yield from live.guards(path, module, owner, lambda: forward.mixing() is not None)
        running.add(layers)
