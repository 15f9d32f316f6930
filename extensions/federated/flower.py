"""Rounds in flower's simulation: each client of a round runs in its own process, which may die without the others."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import torch

from loraweave import PackageMissing, TrainingError
from loraweave.extensions.federated.rounds import here
from loraweave.extensions.federated.strategies._strategy import Course, Order, Strategy, Tensors, Trained

# flower's and ray's usage reports would leave the machine
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
DIED = "ActorDiedError"


def flower(course: Course, strategy: Strategy, orders: Sequence[Order]) -> Iterator[tuple[str, Trained | str]]:
    """Carry out the orders in one simulation; yield each client's name with its result, or the reason why it has none.

    A client trains the same as in this process, bit for bit. It takes as many cores as torch has threads here, so that more
    run at once with fewer threads; each process holds a copy of all models. If a process dies, the simulation has none left,
    so every client it then fails to run is tried once more, alone: one that dies again is left out. Raises PackageMissing
    without flwr and ray, TrainingError for a model that is not on the CPU, and where ray does not start.
    """
    if not orders:
        return
    for client_course in (course, *course.own.values()):
        if (device := next(client_course.model.parameters()).device).type != "cpu":
            raise TrainingError(
                "the backend 'flower' shares models on the CPU with its processes, and "
                f"{client_course.model.name_or_path!r} is on {device}"
            )
    outcomes = _simulated(course, strategy, orders)
    for order in orders:
        outcome = outcomes[order.client]
        if isinstance(outcome, str) and DIED in outcome:
            outcome = _simulated(course, strategy, [order])[order.client]
            if isinstance(outcome, str) and DIED in outcome:
                outcome = "its process died"
        yield order.client, outcome


def _simulated(course: Course, strategy: Strategy, orders: Sequence[Order]) -> dict[str, Trained | str]:
    """Return {client: its result, or why it has none}, from one simulation with a node for each order."""
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
    try:
        import ray
        from flwr.app import Message
        from flwr.clientapp import ClientApp
        from flwr.serverapp import ServerApp
        from flwr.simulation import run_simulation
    except ImportError as error:
        raise PackageMissing(f"backend 'flower' needs flwr and ray ({error}): pip install 'loraweave[flower]'") from error

    threads, by_client = torch.get_num_threads(), dict[str, Trained | str]()
    # processes import from the same paths as this one
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    settings: dict[str, Any] = {
        "num_cpus": max(threads, os.cpu_count() or 1),
        "runtime_env": {"env_vars": {**paths, **QUIET}},
    }
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    try:
        ray.init(**settings, **quiet)
    except Exception as error:
        ray.shutdown()
        raise TrainingError(
            f"ray, on which flower's simulation runs, has not started ({error}): on a busy machine it gives up after half a "
            "minute. With checkpoint= the same call goes on from here; backend='here' does without"
        ) from error
    try:
        server, client = ServerApp(), ClientApp()
        client.train()(partial(_carry_out, ray.put((course, strategy)), threads))

        @server.main()  # type: ignore[untyped-decorator]
        def main(grid: Any, context: Any) -> None:
            # the simulation's nodes start while this runs
            while len(nodes := sorted(grid.get_node_ids())) < len(orders):
                time.sleep(0.1)
            sent = dict(zip(nodes, orders, strict=True))
            messages = [
                Message(content=_content(order), message_type="train", dst_node_id=node) for node, order in sent.items()
            ]
            for reply in grid.send_and_receive(messages):
                by_client[sent[reply.metadata.src_node_id].client] = _outcome(reply)

        resources = {"client_resources": {"num_cpus": threads, "num_gpus": 0.0}}
        run_simulation(server, client, num_supernodes=len(orders), backend_config=resources)
    finally:
        ray.shutdown()
    return {order.client: by_client.get(order.client, f"{DIED}: it never answered") for order in orders}


def _carry_out(reference: Any, threads: int, message: Any, _: Any) -> Any:
    """Carry out the order in `message` in a client's process and return the reply; `reference` is ray's, to the course."""
    from flwr.app import ConfigRecord, Message, RecordDict

    course, strategy = _shared(reference)
    # sums of another number of threads round otherwise
    torch.set_num_threads(threads)
    order_fields = message.content["about"]
    received, kept = (_tensors(message.content, name) for name in ("received", "own"))
    order = Order(order_fields["client"], order_fields["round"], received, kept)
    ((_, outcome),) = here(course, strategy, [order])
    if isinstance(outcome, str):
        return Message(content=RecordDict({"about": ConfigRecord({"failed": outcome})}), reply_to=message)
    about = ConfigRecord({"failed": "", "losses": list(outcome.losses)})
    content = {"about": about, "update": _record(outcome.update), "own": _record(outcome.own)}
    return Message(content=RecordDict(content), reply_to=message)


@lru_cache(maxsize=1)
def _shared(reference: Any) -> tuple[Course, Strategy]:
    """Return the course and strategy that ray stores under a reference; each process reads them once."""
    import ray

    shared: tuple[Course, Strategy] = ray.get(reference)
    return shared


def _content(order: Order) -> Any:
    from flwr.app import ConfigRecord, RecordDict

    about = ConfigRecord({"client": order.client, "round": order.round})
    return RecordDict({"about": about, "received": _record(order.received), "own": _record(order.own)})


def _outcome(reply: Any) -> Trained | str:
    if reply.has_error():
        return f"{reply.error.reason}"[:500]
    about = reply.content["about"]
    if about["failed"]:
        return str(about["failed"])
    return Trained(_tensors(reply.content, "update"), _tensors(reply.content, "own"), tuple(about["losses"]))


def _record(tensors: Tensors) -> Any:
    from flwr.app import ArrayRecord

    return ArrayRecord(dict(tensors))


def _tensors(content: Any, name: str) -> Tensors:
    return dict(content[name].to_torch_state_dict())
