"""Which weights answered? A server's answers compared with the model at hand, under every known fault of serving.

`verify_server` asks a server of this package, of vLLM, of llama.cpp or one like them; `loraweave verify URL` does so in a
shell. It needs no other package, the base model unless its answers are already in the cache, and six to nine requests for
each name.
"""

from loraweave.extend import face

_MODULES = {"answers": "Finding ServerReport", "verify": "verify_server"}
__getattr__, __dir__, __all__ = face(__name__, _MODULES)
