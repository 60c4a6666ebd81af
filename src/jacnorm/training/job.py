"""What every training or measuring job does around its own work: one thread, its device, a log, a tracked run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from jacnorm.settings import Settings
from jacnorm.training.devices import one_thread, resolve_device
from jacnorm.training.progress import step_logger
from jacnorm.training.tracking import Tracker, track


@dataclass(frozen=True)
class Job:
    """A job that is running: where it computes and where it reports."""

    device: torch.device
    tracker: Tracker

    def put(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """The tensors on the job's device."""
        return [tensor.to(self.device) for tensor in tensors]


@contextlib.contextmanager
def job(study: str, step: str, command: str, settings: Settings, device: str) -> Iterator[Job]:
    """Run the body as one job with a W&B run of its own (group `study`, job type `step`, config: public `settings`).

    Raises UserError if the device was asked for and is absent.
    """
    one_thread()
    step_logger()
    where = resolve_device(device)
    config = {"command": command, "device": where.type, **settings.public()}
    with track(study, step, f"{study} {step} {command}", config) as tracker:
        yield Job(where, tracker)
