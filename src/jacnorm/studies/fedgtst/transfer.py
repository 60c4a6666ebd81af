"""Fine-tuning on the target: features stay as they are, a new linear read-out learns (section 3).

Features are computed once, so that fine-tuning is multinomial logistic regression, of R runs at once. The optimiser is
Adam with the gradient of (decay / 2) ||weights||^2 added, which the paper does not say; initial read-out and order of
samples depend on the seed alone, so that methods of equal feature width share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from jacnorm.studies.fedgtst.settings import FederatedSettings
from jacnorm.training.batches import batch_indices, steps_per_epoch
from jacnorm.training.progress import Progress
from jacnorm.training.seeds import RunId
from jacnorm.training.stacked import StackedAdam


@dataclass(frozen=True)
class Part:
    """Features of R networks on N samples (R, N, d), and the samples' labels (N,)."""

    features: Tensor
    labels: Tensor


@dataclass(frozen=True)
class FineTuned:
    """What R new read-outs reached: shapes (R,), and along the way (epochs + 1, R), before the first pass too."""

    train_accuracy: Tensor
    validation_accuracy: Tensor
    target_accuracy: Tensor
    target_loss: Tensor
    train_curve: Tensor
    target_curve: Tensor


def initial_read_out(run: RunId, width: int, classes: int) -> dict[str, Tensor]:
    """Weight (classes, width) and bias (classes,), uniform within 1 / sqrt(width) of 0 (PyTorch's Linear)."""
    stream = run.generator(f"new read-out {width} -> {classes}")
    limit = width**-0.5
    return {
        "weight": torch.rand(classes, width, generator=stream) * 2 * limit - limit,
        "bias": torch.rand(classes, generator=stream) * 2 * limit - limit,
    }


def fine_tune(
    settings: FederatedSettings, runs: Sequence[RunId], classes: int, train: Part, validation: Part, test: Part
) -> FineTuned:
    """Train R read-outs on the features of `train`; nothing is learnt or chosen from the other two parts.

    runs: the streams of initial read-outs and orders of samples, equal for those that are to share them.

    A sample whose logits are not all finite counts as classified wrongly: features of a run that ran away overflow.
    """
    width = train.features.shape[2]
    initial = [initial_read_out(run, width, classes) for run in runs]
    read_out = {name: torch.stack([each[name] for each in initial]).to(train.features) for name in initial[0]}
    optimiser = StackedAdam(read_out, settings.fine_tuning_rate)
    count, batch, decay = len(train.labels), settings.fine_tuning_batch, settings.fine_tuning_decay
    per_epoch = steps_per_epoch(count, batch)
    stack = torch.arange(len(runs), device=train.features.device)[:, None]  # (R, 1)
    curves = [(accuracy(read_out, train), accuracy(read_out, test))]
    with Progress(settings.fine_tuning_epochs, f"fine-tuning, {len(runs)} read-outs", unit="epochs") as progress:
        for step in range(settings.fine_tuning_epochs * per_epoch):
            rows = batch_indices(step, runs, count, batch, device=train.features.device)  # (R, B)
            gradients = read_out_gradients(read_out, train.features[stack, rows], train.labels[rows])
            optimiser.step({name: gradients[name] + decay * tensor for name, tensor in read_out.items()})
            if (step + 1) % per_epoch == 0:
                curves.append((accuracy(read_out, train), accuracy(read_out, test)))
                progress.update((step + 1) // per_epoch)
    train_curve, target_curve = (torch.stack(curve) for curve in zip(*curves, strict=True))  # (E + 1, R)
    return FineTuned(
        train_curve[-1],
        accuracy(read_out, validation),
        target_curve[-1],
        mean_loss(read_out, test),
        train_curve,
        target_curve,
    )


def read_out_gradients(read_out: dict[str, Tensor], features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Gradient of each run's mean cross-entropy over its batch: features (R, B, d), labels (R, B)."""
    classes = read_out["bias"].shape[1]
    errors = logits(read_out, features).softmax(2) - functional.one_hot(labels, classes)  # (R, B, C)
    errors = errors / labels.shape[1]
    return {"weight": errors.mT @ features, "bias": errors.sum(1)}


def logits(read_out: dict[str, Tensor], features: Tensor) -> Tensor:
    """(R, N, d) to (R, N, C)."""
    return torch.baddbmm(read_out["bias"][:, None, :], features, read_out["weight"].mT)


def accuracy(read_out: dict[str, Tensor], part: Part) -> Tensor:
    """Share of the samples that each run classifies correctly, (R,), float64 on the CPU."""
    found = logits(read_out, part.features)
    right = (found.argmax(2) == part.labels) & found.isfinite().all(2)
    return right.double().mean(1).cpu()


def mean_loss(read_out: dict[str, Tensor], part: Part) -> Tensor:
    """Mean cross-entropy of each run over the samples, (R,), float64 on the CPU."""
    found = logits(read_out, part.features)
    labels = part.labels.expand(len(found), -1)
    losses = functional.cross_entropy(found.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view_as(labels).double().mean(1).cpu()
