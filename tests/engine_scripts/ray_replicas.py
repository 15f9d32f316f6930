"""Two replicas of the server on Ray Serve: which of them answers what, and what is left when one is killed."""

from __future__ import annotations

import http.client
import json
import os
import socket
import sys
import time
from pathlib import Path

given = json.loads(Path(sys.argv[1]).read_text())
sys.path.insert(0, given["root"])
# its workers, which are no copies of this process
os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)

import ray  # noqa: E402
from ray import serve  # noqa: E402

from loraweave.extensions.cluster import replicated  # noqa: E402
from loraweave.hub.hub import Hub  # noqa: E402
from loraweave.serving.limits import Limits  # noqa: E402


def send(port, body, key="key", path="/v1/completions"):
    """(status, headers, text) of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    connection.request("GET" if data is None else "POST", path, data, headers)
    answer = connection.getresponse()
    found = answer.status, dict(answer.headers), answer.read().decode()
    connection.close()
    return found


def answers(port):
    """Return [formula, prompt, status, replica, text] of every formula and prompt."""
    answered = []
    for prompt in given["prompts"]:
        for formula in given["formulas"]:
            status, headers, text = send(port, {**given["fields"], "model": formula, "prompt": prompt})
            said = json.loads(text)
            shown = said["choices"][0]["text"] if status == 200 else said
            answered.append([formula, prompt, status, headers.get("x-loraweave-replica"), shown])
    return answered


if __name__ == "__main__":
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    with Hub(given["hub"]) as hub:
        app = replicated(hub, base={"name": given["base"]}, api_key="key", limits=Limits(rows=4))
        serve.run(app, route_prefix="/")
        # The replicas tell the proxy what they have every 0.1 s. Two spellings of a formula that come before that may reach
        # two replicas, which then both have it: a replica takes each formula in one spelling first.
        for formula in given["once"]:
            send(port, {**given["fields"], "model": formula, "prompt": given["prompts"][0]})
        time.sleep(10.0)
        said = {"answers": answers(port)}
        asked = {**given["fields"], "model": given["formulas"][0], "prompt": given["prompts"][0]}
        said["streamed"] = send(port, {**asked, "stream": True})[2]
        said["refused"] = [
            send(port, asked, key="other")[0],
            send(port, {**asked, "model": "missing"})[0],
            send(port, {**asked, "model": "a +"})[0],
            send(port, b"{")[0],
            send(port, b" " * 2**21)[0],
        ]
        said["health"] = send(port, None, path="/health")[::2]
        replicas = [each for each in ray.util.list_named_actors(all_namespaces=True) if "Replica#" in each["name"]]
        ray.kill(ray.get_actor(replicas[0]["name"], namespace=replicas[0]["namespace"]))
        said["replicas"] = len(replicas)
        said["afterwards"] = answers(port)
    serve.shutdown()
    ray.shutdown()
    Path(sys.argv[2]).write_text(json.dumps(said))
