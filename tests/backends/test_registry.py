import dataclasses

import pytest
import torch

from compact_fast import available_backends, get_backend
from compact_fast.backends import CompactBackend, RunSpec, choose
from compact_fast.backends.torch_backend import TorchBackend

SPEC = RunSpec(torch.device("cpu"), torch.float32, 100, 16)


@dataclasses.dataclass(frozen=True)
class Refusing(TorchBackend):
    name: str = "refusing"

    def can_run(self, spec):
        return f"no {spec.dtype} here"


def test_names_and_objects():
    assert get_backend("torch").name == "torch"
    mine = TorchBackend(chunk_bytes=1024)
    assert get_backend(mine) is mine
    assert set(available_backends()) >= {"torch", "reference"}
    assert all(isinstance(get_backend(n), CompactBackend) for n in available_backends())


def test_auto_says_why():
    choice = choose("auto", SPEC)
    assert choice.backend.name == "torch"
    assert choice.reason.startswith("auto: first that can run on cpu")
    assert choose("reference", SPEC).reason == "requested"


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("tritn", r"backend='tritn': expected 'auto' or one of"),
        (Refusing(), "backend 'refusing' cannot run: no torch.float32 here"),
        (object(), "neither a name nor a CompactBackend"),
        (TorchBackend(abi=99), "has abi 99, this version needs"),
    ],
)
def test_an_explicit_request_fails_loudly(backend, message):
    with pytest.raises(ValueError, match=message):
        choose(backend, SPEC)
