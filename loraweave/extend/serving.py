"""Servers: applications beside ours, limits, refusals, metrics and the admission of requests."""

from loraweave.registry import face

_MODULES = {
    "serving.app": "make_app make_server",
    "serving.batch": "Prefixes",
    "serving.http": "EventStream loopback_only read_body read_request refused require_loopback unless_gone",
    "serving.limits": "Limits Refusal refusal_of",
    "serving.scheduler": "Admission Metrics too_busy",
}
__getattr__, __dir__, __all__ = face(__name__, _MODULES, "loraweave")
