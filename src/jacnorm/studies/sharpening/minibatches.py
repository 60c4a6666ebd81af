"""The batches that stacked runs see, each as its own regulariser changes it, and the random numbers behind them.

All of it is a function of the step and of a seed's `RunId`. Arms of a seed share the order of samples, the images'
offsets, the partners of mixup and the probes. Letters: R runs, S seeds, B samples, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jacnorm.studies.sharpening.arms import Arm
from jacnorm.studies.sharpening.costs import targets
from jacnorm.studies.sharpening.regularisers import cropped, mixed, shifted
from jacnorm.training.batches import batch_indices
from jacnorm.training.seeds import RunId, numpy_generator


class Batches:
    """Batches for R runs that have one batch size, from N samples of each seed.

    arms, draws: of each run; runs with equal `draws` share their random numbers and their samples. x: (S, N, c, h, w),
    y: labels (S, N), those of each of the S different `draws` in the order in which these come first.
    """

    def __init__(self, arms: Sequence[Arm], draws: Sequence[RunId], x: Tensor, y: Tensor, classes: int) -> None:
        self._x, self._y, self._classes = x, y, classes
        self._size = arms[0].batch
        self._draws = list(dict.fromkeys(draws))
        self._seed_of = torch.tensor([self._draws.index(each) for each in draws], device=x.device)  # (R,)
        self._smoothing = torch.tensor([arm.strength_of("label smoothing") for arm in arms], device=x.device)
        self._radii, self._shifting = self._chosen([arm.strength_of("shifts") for arm in arms])
        self._pads, self._cropping = self._chosen([arm.strength_of("crops") for arm in arms])
        self._alphas, self._mixing = self._chosen([arm.strength_of("mixup") for arm in arms])

    def _chosen(self, strengths: list[float]) -> tuple[Tensor, Tensor]:
        """Strengths of the runs that have any, and those runs, (R',) each."""
        whole = torch.tensor(strengths, device=self._x.device)
        runs = whole.nonzero().flatten()
        return whole[runs], runs

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Images (R, B, c, h, w) and targets (R, B, K) of one step, each tensor a new one."""
        rows = batch_indices(index, self._draws, self._y.shape[1], self._size, device=self._x.device)  # (S, B)
        own = self._seed_of[:, None], rows[self._seed_of]  # (R, 1), (R, B)
        x, wanted = self._x[own], targets(self._y[own], self._classes, self._smoothing)
        self._augment(index, x)
        self._mix(index, x, wanted)
        return x, wanted

    def probes(self, index: int, samples: int) -> Tensor:
        """Gaussian vectors for the logits of each sample of one step, (R, B, K); `samples` is B."""
        streams = [each.generator(f"probe/{index}") for each in self._draws]
        drawn = torch.stack([torch.randn((samples, self._classes), generator=each) for each in streams])  # (S, B, K)
        return drawn.to(self._x)[self._seed_of]

    def _augment(self, index: int, x: Tensor) -> None:
        """Shift or crop the images of the runs that do so, in place."""
        if not len(self._shifting) and not len(self._cropping):
            return
        streams = [each.generator(f"augmentation/{index}") for each in self._draws]
        draws = torch.stack([torch.rand((x.shape[1], 3), generator=each) for each in streams]).to(x)  # (S, B, 3)
        if len(self._shifting):
            signed = 2 * draws[self._seed_of[self._shifting], :, :2] - 1  # (R', B, 2)
            x[self._shifting] = shifted(x[self._shifting], self._radii[:, None, None] * signed)
        if len(self._cropping):
            own = draws[self._seed_of[self._cropping]]  # (R', B, 3)
            x[self._cropping] = cropped(x[self._cropping], self._pads.long(), own)

    def _mix(self, index: int, x: Tensor, wanted: Tensor) -> None:
        """Mix the images and targets of the runs that do so, in place."""
        if not len(self._mixing):
            return
        partners, weights = [], []
        for seed, alpha in zip(self._seed_of[self._mixing].tolist(), self._alphas.tolist(), strict=True):
            each = self._draws[seed]
            draws = numpy_generator(each.study, each.cell, each.seed, f"mixup/{index}")
            partners.append(torch.from_numpy(draws.permutation(x.shape[1])))
            weights.append(draws.beta(alpha, alpha))
        mix = torch.tensor(weights, device=x.device), torch.stack(partners).to(x.device)
        for values in (x, wanted):
            values[self._mixing] = mixed(values[self._mixing], *mix)
