"""Compiling decode.cu: what is kept, and what is said where it cannot be done. No compiler is asked here."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from deployment.kernels.decode import compile as decode
from deployment.kernels.decode.host import Shape

CUDA = torch.device("cuda")


@pytest.fixture
def asked(monkeypatch, tmp_path) -> list[tuple[str, str]]:
    """What is compiled: macros and architecture."""
    found: list[tuple[str, str]] = []

    def compiled(_source: str, defines: dict[str, int], arch: str, _lines: bool = False) -> bytes:
        found.append((repr(defines), arch))
        return f"code {len(found)}".encode()

    monkeypatch.setattr(decode, "_compile", compiled)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return found


@pytest.fixture
def gpu(monkeypatch) -> None:
    """A GPU that is not there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "a GPU")
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _device: nullcontext())


def test_each_shape_is_compiled_once_and_kept(asked, tmp_path, monkeypatch) -> None:
    one = Shape(128, 1, 4, 16, 16, 1, 0, 0, 0)
    first = decode._built("decode", "source", one.defines(), "sm_80")
    assert decode._built("decode", "source", one.defines(), "sm_80") == first and len(asked) == 1
    decode._built("decode", "source", one.defines(), "sm_90")
    decode._built("decode", "other source", one.defines(), "sm_80")
    decode._built("decode", "source", {**one.defines(), "TEAMS": 3}, "sm_80")
    monkeypatch.setattr(decode, "_versions", lambda: ("cuda-core 99",))
    decode._built("decode", "source", one.defines(), "sm_80")
    assert len(asked) == 5
    assert len(list((tmp_path / "kvquant").glob("decode-sm_*.cubin"))) == 5  # and nothing half written
    assert len(list((tmp_path / "kvquant").iterdir())) == 5


def test_a_folder_that_cannot_be_written_is_no_obstacle(asked, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="compiled anew by every process"):
        assert decode._built("decode", "source", {}, "sm_80") == b"code 1"


@pytest.mark.usefixtures("gpu", "asked")
def test_what_is_missing_is_said_once(monkeypatch) -> None:
    def missing(*_: Any) -> Any:
        raise ImportError("No module named 'cuda'")

    monkeypatch.setattr(decode, "_load", missing)
    decode.available.cache_clear()
    with pytest.warns(UserWarning, match=r"general path.*No module named 'cuda'.*pip install -e \.\[cuda\]") as warned:
        assert not decode.available(CUDA) and not decode.available(CUDA)
    assert len(warned) == 1
    decode.available.cache_clear()


@pytest.mark.usefixtures("gpu", "asked")
def test_old_drivers_and_old_gpus_are_named(monkeypatch) -> None:
    class Status(int):
        name = "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"

    monkeypatch.setattr(decode, "_load", lambda _code: decode._checked((Status(222),)))
    assert "CUDA_ERROR_UNSUPPORTED_PTX_VERSION; update the driver" in decode._obstacle(CUDA)
    monkeypatch.setattr(decode, "_load", lambda _code: decode._checked((Status(0), "module")))
    assert decode._obstacle(CUDA) == ""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    assert decode._obstacle(CUDA) == "a GPU has compute capability 7.5, below 8.0"
