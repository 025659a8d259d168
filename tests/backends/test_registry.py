import dataclasses
import logging

import pytest
import torch

from compact_fast import available_backends, backends, get_backend, token_logp
from compact_fast.backends import CompactBackend, RunSpec, choose, triton_backend
from compact_fast.backends.torch_backend import TorchBackend
from compact_fast.backends.triton_backend import TritonBackend

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


def test_auto_asks_for_both_dtypes():
    mixed = dataclasses.replace(SPEC, head_dtype=torch.bfloat16)
    assert mixed.weight_dtype == torch.bfloat16
    assert SPEC.weight_dtype == torch.float32
    assert TritonBackend()._dtype_refusal(mixed) is None
    refused = TritonBackend(tier="fused")._dtype_refusal(mixed)
    assert "hidden states are torch.float32, the head torch.bfloat16" in refused
    wide = dataclasses.replace(SPEC, dtype=torch.float64)
    assert "torch.float64 of hidden states" in TritonBackend()._dtype_refusal(wide)
    seen = []

    class Curious(TorchBackend):
        def can_run(self, spec):
            seen.append((spec.dtype, spec.weight_dtype))
            return True

    hidden, head = torch.randn(4, 16), torch.randn(50, 16, dtype=torch.bfloat16)
    token_logp(hidden, head, torch.arange(4), backend=Curious(name="curious"))
    assert set(seen) == {(torch.float32, torch.bfloat16)}


def test_auto_leaves_the_interpreter_alone(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    choice = choose("auto", SPEC)
    assert choice.backend.name == "torch"
    assert "run in Triton's interpreter, only when asked for" in choice.reason
    assert choose("triton", SPEC).reason == "requested"


def test_auto_says_its_reason_once(monkeypatch, caplog):
    monkeypatch.setattr(backends, "_said", set())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.INFO, logger="compact_fast"):
        for _ in range(3):
            choose("auto", SPEC)
    assert [r.levelname for r in caplog.records] == ["INFO"]  # a CPU misses nothing
    assert "no Triton kernels for device 'cpu'" in caplog.records[0].getMessage()
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="compact_fast"):
        choose("auto", dataclasses.replace(SPEC, device=torch.device("cuda")))
    assert [r.levelname for r in caplog.records] == ["WARNING"]  # its kernels cannot run


def test_what_triton_lacks(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(triton_backend.shutil, "which", lambda name: None)
    lacking = triton_backend._toolchain_refusal.__wrapped__
    assert "C compiler" in lacking(False)
    assert lacking(True) is None
    known = triton_backend.importlib.util.find_spec
    monkeypatch.setattr(
        triton_backend.importlib.util,
        "find_spec",
        lambda name: None if name.endswith("tensor_descriptor") else known(name),
    )
    assert "is too old; 3.4 or newer is needed" in lacking(False)


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
