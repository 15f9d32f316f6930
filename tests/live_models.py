"""What tests of live mixing share: a batch, what a model answers, and what is left on it."""

import threading

import torch
from installed import needs_entry

IDS = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(5))
# without a hook that traces mixtures, torch.compile leaves them outside its graphs
in_whole_graphs = needs_entry("hooks", "compiled")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@torch.no_grad()
def logits(model, ids=IDS, **inputs):
    return model(input_ids=ids, **inputs).logits


def num_hooks(model):
    """Hooks, and forwards that stand in for a module's own."""
    return sum(sum(len(getattr(module, kind)) for kind in HOOKS) + ("forward" in vars(module)) for module in model.modules())


def in_thread(call):
    """What `call` returns, or the exception it raises, in a thread of its own."""
    return in_threads([call])[0]


def in_threads(calls):
    """What each call returns, or the exception it raises, in threads that begin together."""
    answers, barrier = [None] * len(calls), threading.Barrier(len(calls))

    def run(place):
        barrier.wait()
        try:
            answers[place] = calls[place]()
        except BaseException as error:
            answers[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers
