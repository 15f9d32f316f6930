"""Formulas for SGLang and LoRAX, which cannot ask for names themselves: a folder is loaded by a documented call.

SGLang: POST /load_lora_adapter and /unload_lora_adapter (docs/advanced_features/lora.ipynb). LoRAX loads what a request
names (docs/models/adapters/index.md), so it is asked for one token. Written from these pages; neither server was run.
"""

import json
import urllib.error
import urllib.request
from typing import Any

from loraweave import AdapterUnsupported, SourceUnavailable, UnknownName
from loraweave.extend import nearest
from loraweave.extensions.engines.folders import Folder

ENGINES = ("sglang", "lorax")
# seconds: a server reads the folder before it answers
TIMEOUT_S = 300.0


def load(folder: Folder, url: str, *, engine: str) -> dict[str, Any]:
    """Load a folder into a server that sees it under the same path, and return the fields that requests must carry.

    For SGLang {"lora_path": name} of its own API; its OpenAI API takes "BASE:name" as the model. For LoRAX {"parameters":
    {"adapter_id", "adapter_source"}}. The name is the beginning of the folder's key: another content is another name.
    Raises UnknownName for another engine, AdapterUnsupported with the server's words where it refuses, SourceUnavailable
    where no such server answers.
    """
    require_engine(engine)
    path = str(folder.path.absolute())
    if engine == "sglang":
        name = folder.key[:16]
        _post(f"{url.rstrip('/')}/load_lora_adapter", {"lora_name": name, "lora_path": path}, folder.canonical)
        return {"lora_path": name}
    fields = {"adapter_id": path, "adapter_source": "local"}
    payload = {"inputs": "a", "parameters": {**fields, "max_new_tokens": 1}}
    _post(f"{url.rstrip('/')}/generate", payload, folder.canonical)
    return {"parameters": fields}


def unload(folder: Folder, url: str, *, engine: str) -> None:
    """Make SGLang forget a folder; LoRAX does so by itself. Raises what `load` raises."""
    require_engine(engine)
    if engine == "sglang":
        _post(f"{url.rstrip('/')}/unload_lora_adapter", {"lora_name": folder.key[:16]}, folder.canonical)


def require_engine(engine: str) -> None:
    """Raise UnknownName unless `engine` is one that a folder can be loaded into ("sglang", "lorax")."""
    if engine not in ENGINES:
        raise UnknownName(
            f"no engine {engine!r}{nearest(engine, ENGINES)}; there are {', '.join(ENGINES)}; vLLM asks loraweave by itself"
        )


def _post(url: str, body: dict[str, Any], what: str) -> None:
    if not url.startswith(("http://", "https://")):
        raise SourceUnavailable(f"{url!r} is not the address of a server, which begins with http:// or https://")
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            said = answer.read(1 << 20)
    except urllib.error.HTTPError as error:
        refused = error.read(2000).decode(errors="replace")
        raise AdapterUnsupported(f"{url} refuses {what!r:.200}: {error.code} {refused}") from error
    except OSError as error:
        raise SourceUnavailable(f"nothing answers at {url}: {error}") from error
    # SGLang also reports a refusal in a successful answer
    if b'"success"' in said and json.loads(said).get("success") is False:
        raise AdapterUnsupported(f"{url} refuses {what!r:.200}: {said[:2000].decode(errors='replace')}")
