"""Training of gLSTM on Peptides: one network per task, ablation and seed, as wide as the number of parameters allows.

Settings of the paper: LayerNorm at the input of each layer, mean over atoms, a linear head; AdamW with clipped
gradients; the step size is halved when the validation loss has not fallen for 20 epochs. Validation selects the epoch,
the last among equals. An ablation keeps the width of the full network, and its unused maps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jacnorm.code_version import code_version
from jacnorm.errors import UserError
from jacnorm.studies.glstm import tables as study_tables
from jacnorm.studies.glstm.layers import GATES, GLSTM, Activation, drawn, parameter_count
from jacnorm.studies.glstm.peptides import (
    ENCODING_WIDTH,
    TARGETS,
    AtomEncoder,
    Joined,
    Molecules,
    Peptides,
    average_precision,
    flipped,
    join,
    load,
)
from jacnorm.studies.glstm.recall import STUDY
from jacnorm.studies.glstm.settings import Ablation, Device, PeptidesSettings
from jacnorm.training import snapshots as snapshot_files
from jacnorm.training.batches import batch_indices, steps_per_epoch
from jacnorm.training.checkpoint import fingerprint, pack, unpack
from jacnorm.training.job import Job, job
from jacnorm.training.loop import FitReport, RunId, discard, fit
from jacnorm.training.snapshots import Snapshot

CLIP = 1.0
FACTOR, PLATEAU, SMALLEST_RATE = 0.5, 20, 1e-5
"""The step size is multiplied by FACTOR after more than PLATEAU epochs without a lower validation loss."""


class Body(NamedTuple):
    """What the paper chose for a task."""

    layers: int
    heads: int
    memory: int
    dropout: float
    activation: Activation


BODIES: dict[Peptides, Body] = {
    "func": Body(27, 2, 32, 0.1, "identity"),
    "struct": Body(23, 5, 16, 0.0, "relu"),
}


class PeptidesNetwork(nn.Module):
    """Atom encoder, gLSTM, mean over atoms, linear head."""

    def __init__(self, task: Peptides, width: int, ablation: Ablation | str = "none") -> None:
        super().__init__()
        body = BODIES[task]
        self.encoder = AtomEncoder(task, width)
        self.body = GLSTM(
            width, body.layers, body.memory, heads=body.heads, activation=body.activation, without=GATES[ablation],
            norm_in=True, dropout=body.dropout,
        )  # fmt: skip
        self.head = nn.Linear(width, TARGETS[task])

    def forward(self, batch: Joined, generator: torch.Generator | None = None) -> Tensor:
        """Logits or numbers of each molecule, (G, targets). generator: for dropout, while training."""
        h = self.body(self.encoder(batch.atoms, batch.encodings), batch.edges, generator)  # (V, d)
        total = h.new_zeros(len(batch.targets), h.shape[1]).index_add(0, batch.graph, h)
        return self.head(total / torch.bincount(batch.graph).to(h).unsqueeze(1))


def peptides(settings: PeptidesSettings, tables: Path, weights: Path, device: Device = "auto") -> None:
    """Train on every task with every ablation and seed; the table of scores, and the selected weights."""
    with job(STUDY, "train", "peptides", settings, device) as this:
        rows: list[dict[str, Any]] = []
        kept: list[Snapshot] = []
        checkpoints: list[Path] = []
        for task in settings.tasks:
            width = largest_width(task, settings.parameters)
            data = load(task, weights.parent / "lrgb")
            for ablation in ("none", *settings.ablations):
                for seed in settings.seeds:
                    name = f"{weights.stem}-{task}-{ablation}-{seed}.checkpoint.safetensors"
                    checkpoints.append(weights.with_name(name))
                    run = Run(settings, task, ablation, seed, width, data, this.device)
                    report = _fit(run, checkpoints[-1], this)
                    rows.append(run.row(report))
                    kept.append(run.snapshot())
        study_tables.write(tables, "peptides_fits", settings, rows, this.tracker)
        snapshot_files.save(weights, kept)
        for checkpoint in checkpoints:
            discard(checkpoint)


def largest_width(task: Peptides, parameters: int) -> int:
    """The largest width d whose network has at most `parameters`, by bisection.

    Raises UserError if not even the narrowest fits, which has one unit besides the positional encoding.
    """

    def count(width: int) -> int:
        with torch.device("meta"):
            return parameter_count(PeptidesNetwork(task, width))

    low = ENCODING_WIDTH[task] + 1
    if (least := count(low)) > parameters:
        raise UserError(
            f"setting parameters is {parameters}, but the narrowest network of Peptides-{task} has {least}: raise it"
        )
    high = 2 * low
    while count(high) <= parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= parameters else (low, middle)
    return low


class Run:
    """One network in training: a `jacnorm.training.loop.Trainee`."""

    def __init__(
        self,
        settings: PeptidesSettings,
        task: Peptides,
        ablation: Ablation | str,
        seed: int,
        width: int,
        data: Mapping[str, Molecules],
        device: torch.device,
    ) -> None:
        self.settings, self.task, self.ablation, self.seed, self.width = settings, task, ablation, seed, width
        self.data, self._device = data, device
        self.id = RunId(STUDY, f"peptides {task} {ablation}", seed)
        shared = RunId(STUDY, f"peptides {task}", seed)  # ablations start and go through the data alike
        network = drawn(lambda: PeptidesNetwork(task, width, ablation), shared.generator("initial"))
        self.network = network.to(device)
        self._optimiser = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=0.0)
        self.generators = {
            "dropout": shared.generator("dropout", device),
            "signs": shared.generator("signs"),
        }
        self._order = shared
        self.steps_per_epoch = steps_per_epoch(len(data["train"]), settings.batch)
        self.selected = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        self._seen = {
            "best": torch.tensor(-math.inf),
            "waited": torch.tensor(0),
            "lowest_loss": torch.tensor(math.inf),
            "plateau": torch.tensor(0),
            "rate": torch.tensor(settings.learning_rate, dtype=torch.float64),
        }

    def step(self, index: int) -> dict[str, Tensor]:
        """One update. Metrics: loss; validation_score and validation_loss after each epoch."""
        self.network.train()
        rows = batch_indices(index, [self._order], len(self.data["train"]), self.settings.batch)[0].tolist()
        batch = self._joined("train", rows)
        if self.task == "struct":
            batch = batch._replace(encodings=flipped(batch.encodings, batch.graph, self.generators["signs"]))
        loss = self._loss(self.network(batch, self.generators["dropout"]), batch.targets)
        self._optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), CLIP)
        for group in self._optimiser.param_groups:
            group["lr"] = self._seen["rate"].item()
        self._optimiser.step()
        metrics = {"loss": loss.detach()}
        return metrics | self._look() if (index + 1) % self.steps_per_epoch == 0 else metrics

    def _joined(self, split: str, rows: list[int]) -> Joined:
        layers, k_hop = BODIES[self.task].layers, self.ablation != "1-hop"
        return join(self.data[split], rows, layers, k_hop=k_hop, device=self._device)

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.task == "func":
            return nn.functional.binary_cross_entropy_with_logits(outputs, targets)
        return (outputs - targets).abs().mean()

    def _look(self) -> dict[str, Tensor]:
        """Select by the validation score after an epoch, and lower the step size on a plateau of the loss."""
        score, loss = self.evaluate("validation")
        better = score if self.task == "func" else -score
        seen = self._seen
        if better >= seen["best"].item():
            seen["waited"].fill_(0 if better > seen["best"].item() else seen["waited"].item() + 1)
            seen["best"].fill_(better)
            for name, tensor in self.network.state_dict().items():
                self.selected[name].copy_(tensor)
        else:
            seen["waited"] += 1
        if loss < seen["lowest_loss"].item():
            seen["lowest_loss"].fill_(loss)
            seen["plateau"].fill_(0)
        else:
            seen["plateau"] += 1
        if seen["plateau"].item() > PLATEAU:
            seen["rate"].fill_(max(FACTOR * seen["rate"].item(), min(SMALLEST_RATE, seen["rate"].item())))
            seen["plateau"].fill_(0)
        return {"validation_score": torch.tensor(score), "validation_loss": torch.tensor(loss)}

    @torch.no_grad()
    def evaluate(self, split: str) -> tuple[float, float]:
        """Score (average precision, or mean absolute error) and loss on a split, of the present weights."""
        self.network.eval()
        outputs = [
            self.network(self._joined(split, rows.tolist())).cpu()
            for rows in torch.arange(len(self.data[split])).split(self.settings.batch)
        ]
        found, targets = torch.cat(outputs), self.data[split].targets
        loss = self._loss(found, targets).item()
        return (average_precision(found, targets) if self.task == "func" else loss), loss

    def finished(self) -> bool:
        """Whether validation has not got better for `patience` epochs."""
        return self._seen["waited"].item() >= self.settings.patience

    def row(self, report: FitReport) -> dict[str, Any]:
        """The row of the table; scores are those of the selected epoch, NaN after divergence."""
        bad = report.diverged[0]
        self.network.load_state_dict(self.selected)
        scores = {f"{split}_score": self.evaluate(split)[0] for split in ("validation", "test")}
        return {
            "seed": self.seed,
            "task": self.task,
            "model": "glstm",
            "ablation": self.ablation,
            "width": self.width,
            "parameters": parameter_count(self.network),
            "epochs": report.steps // self.steps_per_epoch,
            **{name: math.nan if bad is not None else score for name, score in scores.items()},
            "diverged_at": -1 if bad is None else bad,
        }

    def snapshot(self) -> Snapshot:
        """The selected weights."""
        cell = {"task": self.task, "ablation": self.ablation, "width": self.width, "seed": self.seed}
        return Snapshot(cell, {name: tensor.cpu().unsqueeze(0) for name, tensor in self.selected.items()})

    def state(self) -> dict[str, Tensor]:
        """Weights, moments, what was selected, and what validation said so far."""
        moments = {
            f"{name}/{moment}": tensor
            for name, parameter in self.network.named_parameters()
            for moment, tensor in self._optimiser.state.get(parameter, {}).items()
        }
        groups = {"network": self.network.state_dict(), "selected": self.selected, "seen": self._seen}
        return pack(**groups, moments=moments)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""
        for group, tensors in (
            ("network", self.network.state_dict()),
            ("selected", self.selected),
            ("seen", self._seen),
        ):
            for name, found in unpack(state, group).items():
                tensors[name].copy_(found)
        moments = unpack(state, "moments")
        for name, parameter in self.network.named_parameters():
            own = {key.rpartition("/")[2]: value for key, value in moments.items() if key.rpartition("/")[0] == name}
            if own:
                self._optimiser.state[parameter] = {
                    key: value.clone() if key == "step" else value.to(self._device) for key, value in own.items()
                }


def _fit(run: Run, checkpoint: Path, this: Job) -> FitReport:
    settings = run.settings
    return fit(
        run,
        steps=settings.epochs * run.steps_per_epoch,
        checkpoint=checkpoint,
        runs=[run.id],
        fingerprint=fingerprint(
            [settings.public(), run.width, [data.digest() for data in run.data.values()], this.device.type],
            code_version(f"jacnorm.studies.{STUDY}.train_peptides"),
        ),
        on_divergence="record",
        check_every=run.steps_per_epoch,  # a run ends at the end of an epoch
        tracker=this.tracker,
        label=f"Peptides-{run.task}, {run.ablation}, seed {run.seed}",
    )
