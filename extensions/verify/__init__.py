"""Which weights answered? A server's answers compared with the model at hand, under every known fault of serving.

`verify_server` asks a server of this package, of vLLM, of llama.cpp or one like them; `loraweave verify URL` does so in a
shell. It needs no other package, the base model unless its answers are already in the cache, and six to nine requests for
each name.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.verify.answers import Finding, ServerReport
    from loraweave.extensions.verify.verify import verify_server
else:
    __getattr__ = lazy(__name__, {f"{__name__}.verify": "verify_server", f"{__name__}.answers": "Finding ServerReport"})

__all__ = ["Finding", "ServerReport", "verify_server"]
