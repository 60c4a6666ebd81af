from __future__ import annotations

import os

import pytest
import torch

from jacnorm.errors import UserError
from jacnorm.training.devices import one_thread, resolve_device


@pytest.fixture
def restored(monkeypatch):
    """Put process-wide switches back."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = benchmark
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.parametrize(
    ("name", "present", "device"),
    [
        ("cpu", False, "cpu"),
        ("cpu", True, "cpu"),
        ("auto", False, "cpu"),
        ("auto", True, "cuda"),
        ("cuda", True, "cuda"),
    ],
)
def test_devices(monkeypatch, name, present, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: present)
    assert resolve_device(name) == torch.device(device)


@pytest.mark.parametrize(("build", "words"), [(None, "built without CUDA"), ("12.8", "built for CUDA 12.8")])
def test_cuda_that_is_absent_is_refused(monkeypatch, build, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", build)
    with pytest.raises(UserError, match=rf'"cuda" was asked for.*{words}.*set device to cpu or auto'):
        resolve_device("cuda")


def test_unknown_devices_are_refused():
    with pytest.raises(UserError, match='"tpu" is unknown: choose auto, cpu or cuda'):
        resolve_device("tpu")


def test_one_thread_and_deterministic_algorithms_only(restored):
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(2)
    one_thread()
    one_thread()  # may be called again
    assert torch.get_num_threads() == 1
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    with pytest.raises(RuntimeError, match="deterministic"):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
