"""Which weights answered? What a server says beside the model at hand, and beside it with everything that may go wrong.

`verify_server` asks ours, vLLM's, llama.cpp's or one like them; `loraweave verify URL` does so in a shell. It needs no other
package, the base model where it has not kept what that answers, and six to nine requests for each name.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.verify.answers import Finding, ServerReport
    from loraweave.extensions.verify.verify import verify_server
else:
    __getattr__ = lazy(__name__, {f"{__name__}.verify": "verify_server", f"{__name__}.answers": "Finding ServerReport"})

__all__ = ["Finding", "ServerReport", "verify_server"]
