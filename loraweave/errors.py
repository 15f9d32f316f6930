"""Every error that loraweave raises, as one tree.

LoraweaveError
├── HubError
│   ├── AdapterNotFound (KeyError)        no adapter of that name; near misses are named
│   ├── AdapterExists (ValueError)        the name already stands for another adapter
│   ├── AdapterCorrupt (ValueError)       files or blobs that are damaged, truncated or not finite
│   ├── AdapterUnsupported (ValueError)   a feature that cannot be represented exactly
│   ├── AdapterSuspicious (ValueError)    updates beyond fp32, anomalies that a policy refuses
│   ├── AdapterQuarantined (PermissionError)  stored, but unusable until it is released
│   ├── SourceUnavailable (ConnectionError)  the model hub cannot be reached, limits requests, or broke off
│   ├── InvalidName (ValueError)          a name that cannot be stored
│   ├── InvalidLicense (ValueError)       a license that is not an SPDX expression, or excludes another
│   ├── HubLocked (TimeoutError)          another process holds the write lock
│   ├── HubReadOnly (PermissionError)     the folder cannot be written
│   ├── HubFull (OSError)                 the disk is full
│   └── HubCorrupt (ValueError)           the catalogue itself is damaged or too new
├── RetrievalError
│   ├── EmptyIndex (LookupError)          nothing to search
│   └── DimensionMismatch (ValueError)    an embedding of the wrong size or not finite
├── WeightingError (ValueError)
│   ├── ScopeError                        weights whose scope does not fit the use
│   ├── UnknownExpert (KeyError)          a weight for an adapter that is not in the pool
│   ├── InvalidTask                       examples, labels or settings that cannot be used
│   ├── FormulaError                      a formula that cannot be read, or names what is not there; the place is marked
│   └── SearchFailed (RuntimeError)       no candidate of a search could be scored
├── CompositionError
│   ├── LayerMismatch (ValueError)        factors and layer differ in shape or kind
│   ├── BaseModelMismatch (ValueError)    adapters that were made for another base model
│   ├── AlreadyActive (RuntimeError)      the model is in a state that forbids the call
│   └── BudgetExceeded (MemoryError)      experts, or a training, that need more bytes than they may
├── TrainingError (RuntimeError)          training that cannot start, go on or resume
├── WorkersFailed (RuntimeError)          workers that are unavailable, or were lost with a piece of work
├── PackageMissing (ImportError)          an optional package; the message has the install command
├── PluginFailed (ImportError)            what another package registers and cannot be used
└── UnknownName (LookupError)             no file of that name in a registry folder

A leaf also inherits the built-in exception that a caller would guess. Errors are raised before anything has changed, and
their message says what was asked, what was found, and the way out. `BaseModelUnverified` alone is a warning.
"""

from typing import Self


class LoraweaveError(Exception):
    """The root of every error raised by loraweave."""

    def __str__(self) -> str:
        # KeyError would show the repr of its message, which puts the whole sentence in quotes
        return " ".join(str(argument) for argument in self.args)


class HubError(LoraweaveError):
    """The root of errors about stored adapters."""


class AdapterNotFound(HubError, KeyError):
    """A name that no adapter has."""


class AdapterExists(HubError, ValueError):
    """A name that already stands for an adapter with other content."""


class AdapterCorrupt(HubError, ValueError):
    """Damaged, truncated or non-finite adapter files."""


class AdapterUnsupported(HubError, ValueError):
    """A feature of an adapter that cannot be represented exactly."""


class AdapterSuspicious(HubError, ValueError):
    """An update that is beyond what fp32 holds, or anomalies that the policy for adding refuses."""


class AdapterQuarantined(HubError, PermissionError):
    """An adapter that is stored, but unusable until it is released."""


class SourceUnavailable(HubError, ConnectionError):
    """A model hub that cannot be reached, limits requests, or broke off; the same call may work later."""


class InvalidName(HubError, ValueError):
    """A name that cannot be stored."""


class InvalidLicense(HubError, ValueError):
    """A license that is not an SPDX expression, or licenses that exclude each other or any work derived from an adapter."""


class HubLocked(HubError, TimeoutError):
    """A write lock of the hub that another process holds."""


class HubReadOnly(HubError, PermissionError):
    """A hub's folder that cannot be written."""


class HubFull(HubError, OSError):
    """A full disk below the hub."""


class HubCorrupt(HubError, ValueError):
    """A catalogue that is damaged, or written by a newer version."""


class RetrievalError(LoraweaveError):
    """The root of errors about finding adapters."""


class EmptyIndex(RetrievalError, LookupError):
    """A search of a hub or an index that holds nothing to find."""


class DimensionMismatch(RetrievalError, ValueError):
    """An embedding whose size or values do not fit the index."""


class WeightingError(LoraweaveError, ValueError):
    """The root of errors about mixture weights."""


class ScopeError(WeightingError):
    """Weights whose scope does not fit the use made of them."""


class UnknownExpert(WeightingError, KeyError):
    """A weight for an adapter that is not in the pool."""


class InvalidTask(WeightingError):
    """Examples, labels or settings that cannot be used."""


class FormulaError(WeightingError):
    """A formula that cannot be read or names a missing adapter; the message ends with the formula, a caret at the place."""


class SearchFailed(WeightingError, RuntimeError):
    """A search none of whose candidates could be scored."""


class CompositionError(LoraweaveError):
    """The root of errors about putting adapters into a model."""


class LayerMismatch(CompositionError, ValueError):
    """Factors and a layer that differ in shape or kind."""


class BaseModelMismatch(CompositionError, ValueError):
    """Adapters that were made for another base model."""


class AlreadyActive(CompositionError, RuntimeError):
    """A model in a state that forbids the call."""


class BudgetExceeded(CompositionError, MemoryError):
    """Experts, or a training, that need more bytes than they may have."""

    # MemoryError's refuses to make this class where Dask's workers unpickle one
    def __new__(cls, *args: object) -> Self:
        return Exception.__new__(cls, *args)


class TrainingError(LoraweaveError, RuntimeError):
    """Training that cannot start, go on or resume."""


class WorkersFailed(LoraweaveError, RuntimeError):
    """The workers that `n_jobs` asks for are not available, or several were lost with the same piece of work."""


class PackageMissing(LoraweaveError, ImportError):
    """An optional package that is not installed."""


class PluginFailed(LoraweaveError, ImportError):
    """Another package's entry point that cannot be used."""


class UnknownName(LoraweaveError, LookupError):
    """A name that no file of a registry folder has."""


class BaseModelUnverified(UserWarning):
    """Adapters whose layers fit the model by names and shapes, while neither weights nor ids show that it is their base."""
