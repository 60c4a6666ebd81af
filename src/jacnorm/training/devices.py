"""Where a job computes, and the switches that make its bits repeatable."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from jacnorm.errors import UserError

if TYPE_CHECKING:
    import torch


def resolve_device(name: str) -> torch.device:
    """The device for "auto" (CUDA if there is any, else the CPU), "cpu" or "cuda".

    Raises UserError for another name, and for "cuda" where PyTorch sees no CUDA device: a job never moves to the CPU
    in silence.
    """
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f'device "{name}" is unknown: choose auto, cpu or cuda')
    present = torch.cuda.is_available()
    if name == "cuda" and not present:
        build = "built without CUDA" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        raise UserError(
            f'device "cuda" was asked for, but PyTorch {torch.__version__} ({build}) sees no CUDA device: '
            "set device to cpu or auto, or run on a machine with a GPU and its driver"
        )
    return torch.device("cuda" if present and name != "cpu" else "cpu")


def one_thread() -> None:
    """Make this process compute on one CPU thread and with deterministic algorithms only; every step calls it first.

    One thread, because sums split over threads change in their last bits with the number of cores (and the small
    products of these studies are slower on two threads). An operation without a deterministic implementation raises
    RuntimeError instead of giving other bits in the next run.
    """
    # cuBLAS reads this when its first handle is made; without it, deterministic mode refuses matrix products on a GPU.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(RuntimeError):  # refused once an inter-op pool has started; nothing here uses that pool
        torch.set_num_interop_threads(1)
    torch.backends.cudnn.benchmark = False
    # The same switch as `torch.use_deterministic_algorithms(True)`, which also imports the compiler: 0.8 s a job.
    torch.set_deterministic_debug_mode("error")
