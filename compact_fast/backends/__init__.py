"""Backends by name, and the choice among them.

Other packages add backends by an entry point of the group `compact.backends`, whose value is a
CompactBackend or a callable that returns one. They are taken when asked for by name; "auto" looks
among our own.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points

import torch

from compact_fast.backends.protocol import ABI, CompactBackend, RunSpec
from compact_fast.backends.reference_backend import ReferenceBackend
from compact_fast.backends.torch_backend import TorchBackend
from compact_fast.backends.triton_backend import TritonBackend

logger = logging.getLogger(__name__)

__all__ = [
    "Choice",
    "CompactBackend",
    "RunSpec",
    "available_backends",
    "choose",
    "get_backend",
    "resolve",
]

_BUILT_IN: dict[str, CompactBackend] = {
    "triton": TritonBackend(),
    "torch": TorchBackend(),
    "reference": ReferenceBackend(),
}
ENTRY_POINTS = "compact.backends"
_AUTO_ORDER = ("triton", "torch")  # the reference holds full logits: only ever on request
_OBJECTS: dict[str, CompactBackend] = {}  # handle -> object; operators take text only
_said: set[str] = set()


@dataclass(frozen=True)
class Choice:
    """A backend and why it was taken."""

    backend: CompactBackend
    reason: str

    @property
    def handle(self) -> str:
        """Text that `resolve` turns back into this backend."""
        if _BUILT_IN.get(self.backend.name) is self.backend:
            return self.backend.name
        handle = f"{self.backend.name}@{id(self.backend):x}"
        _OBJECTS[handle] = self.backend  # keeps it alive, so that the id stays its own
        return handle


def choose(backend: str | CompactBackend = "auto", spec: RunSpec | None = None) -> Choice:
    """The backend that will run, with the reason.

    A name or an object is taken at its word: if it cannot run `spec`, ValueError says why. Only
    "auto" looks further, and logs once what kept a faster backend from running.
    """
    if backend == "auto":
        return _first_that_can(spec or _usual_spec())
    if isinstance(backend, str):
        found = _OBJECTS.get(backend) or _BUILT_IN.get(backend) or _from_plugin(backend)
    else:
        if not isinstance(backend, CompactBackend):
            raise ValueError(f"backend={backend!r} is neither a name nor a CompactBackend")
        found = backend
    if found.abi != ABI:
        raise ValueError(f"backend {found.name!r} has abi {found.abi}, this version needs {ABI}")
    verdict = True if spec is None else _verdict(found, spec)
    if verdict is not True:
        raise ValueError(f"backend {found.name!r} cannot run: {verdict}")
    return Choice(found, "requested")


def _first_that_can(spec: RunSpec) -> Choice:
    refused: list[str] = []
    for name in _AUTO_ORDER:
        verdict = _verdict(_BUILT_IN[name], spec)
        if name == "triton" and spec.device.type == "cpu" and verdict is True:
            verdict = "on a CPU its kernels run in Triton's interpreter, only when asked for"
        if verdict is True:
            why = f"first that can run on {spec.device}"
            choice = Choice(_BUILT_IN[name], f"auto: {'; '.join([why, *refused])}")
            _say_once(choice, spec, fell_back=bool(refused))
            return choice
        refused.append(f"{name}: {verdict}")
    raise ValueError("no backend can run here: " + "; ".join(refused))


def _verdict(backend: CompactBackend, spec: RunSpec) -> bool | str:
    """`can_run`, of a backend that may know nothing of soft-capped logits."""
    if spec.softcap and not getattr(backend, "caps_logits", False):
        return f"it does not cap logits (softcap={spec.softcap})"
    return backend.can_run(spec)


def _say_once(choice: Choice, spec: RunSpec, *, fell_back: bool) -> None:
    """A GPU without its own kernels is worth a warning; a CPU has none to miss."""
    text = f"backend {choice.backend.name} ({choice.reason})"
    if text not in _said:
        _said.add(text)
        level = logging.WARNING if fell_back and spec.device.type == "cuda" else logging.INFO
        logger.log(level, "%s", text)


def _usual_spec() -> RunSpec:
    """What a run on this machine would most likely ask for."""
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    return RunSpec(torch.device("cuda" if gpu else "cpu"), dtype, 49152, 1024)


def resolve(handle: str, spec: RunSpec) -> CompactBackend:
    """The backend behind a name or handle; ValueError if it cannot run `spec`."""
    return choose(handle, spec).backend


def get_backend(backend: str | CompactBackend = "auto") -> CompactBackend:
    """The backend of that name ("auto": the one that is taken by default)."""
    return choose(backend).backend


def available_backends(spec: RunSpec | None = None) -> dict[str, bool | str]:
    """Every known backend: True, or the reason why it cannot run `spec` (None: the usual run)."""
    spec = spec or _usual_spec()
    found: dict[str, bool | str] = {}
    for name in (*_BUILT_IN, *_plugins()):
        try:
            choose(name, spec)
            found[name] = True
        except ValueError as error:
            found[name] = str(error).removeprefix(f"backend {name!r} cannot run: ")
    return found


@cache
def _plugins() -> dict[str, EntryPoint]:
    """Entry points by name. A name of ours, or one claimed twice, is nobody's."""
    points: dict[str, EntryPoint] = {}
    for point in entry_points(group=ENTRY_POINTS):
        if point.name in _BUILT_IN or point.name == "auto" or point.name in points:
            logger.warning(
                "backend %r of %s is ignored: the name is taken", point.name, point.value
            )
        else:
            points[point.name] = point
    return points


@cache
def _from_plugin(name: str) -> CompactBackend:
    point = _plugins().get(name)
    if point is None:
        known = ", ".join(sorted((*_BUILT_IN, *_plugins())))
        raise ValueError(f"backend={name!r}: expected 'auto' or one of {known}")
    try:
        made = point.load()
        if isinstance(made, type) or not isinstance(made, CompactBackend):
            made = made()
    except Exception as error:  # whatever a plugin raises, the user asked for it by name
        raise ValueError(f"backend {name!r} ({point.value}) cannot be loaded: {error}") from error
    if not isinstance(made, CompactBackend):
        raise ValueError(f"backend {name!r} ({point.value}) is no CompactBackend: {made!r}")
    return made
