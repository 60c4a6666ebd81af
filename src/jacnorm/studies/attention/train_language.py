"""Training of a small GPT-2 on texts, one model per text and seed; and the windows of text that are probed.

AdamW with a one-cycle step size, clipped gradients and no dropout; the recipe is ours, for the paper trains nothing. Of
a model that the user gives, only the windows are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jacnorm.code_version import code_version
from jacnorm.data.read import PreparedText, read_text
from jacnorm.errors import UserError
from jacnorm.studies.attention import language
from jacnorm.studies.attention import tables as study_tables
from jacnorm.studies.attention.capture import context
from jacnorm.studies.attention.given_model import GivenModel, load_model
from jacnorm.studies.attention.language import STUDY, Kept, Shape
from jacnorm.studies.attention.settings import Device, ProbingSettings
from jacnorm.training.batches import batch_indices
from jacnorm.training.checkpoint import fingerprint
from jacnorm.training.job import Job, job
from jacnorm.training.loop import RunId, discard, fit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BETAS = (0.9, 0.95)
"""Decay rates of AdamW's moments."""
WARM_UP, FIRST_SHARE, LAST_SHARE = 0.1, 1 / 25, 1 / 25e4
"""Of one cycle: share of the steps that warm up, first and last step size as shares of the largest."""
EVALUATION_BATCH = 32


def probing(settings: ProbingSettings, tables: Path, data: list[Path], weights: Path, device: Device = "auto") -> None:
    """Train a model per text and seed, or load the given one; keep models and windows of text."""
    with job(STUDY, "train", "probing", settings, device) as this:
        texts = [read_text(path) for path in data]
        given = None if settings.model is None else load_model(settings.model, device=this.device)
        rows: list[dict[str, Any]] = []
        kept: list[Kept] = []
        for text in texts:
            if given is None:
                found, fits = _trained(settings, text, weights, this)
            else:
                found, fits = _given(settings, text, given)
            kept.append(found)
            rows += fits
        study_tables.write(tables, "language_fits", settings, rows, this.tracker)
        language.save(weights, kept)
        for text in texts:
            for seed in settings.seeds:
                discard(_checkpoint(weights, text.name, seed))


def _given(settings: ProbingSettings, text: PreparedText, given: GivenModel) -> tuple[Kept, list[dict[str, Any]]]:
    """Windows of the whole text for a model that is given, and how well it predicts them."""
    length, longest = max(settings.lengths), context(given.model)
    if longest is not None and length > longest:
        raise UserError(
            f"lengths asks for {length} tokens, but model {given.label} reads at most {longest}; lower lengths"
        )
    token_ids = given.token_ids(text.text)
    runs = [RunId(STUDY, f"{text.name} windows", seed) for seed in settings.seeds]
    windows = language.windows(token_ids, length, settings.windows, runs, text.label)
    kept = Kept(
        text.name, text.label, text.digest, settings.seeds, windows, model=given.label, model_digest=given.digest()
    )
    rows = [
        {
            "seed": seed,
            "data_set": text.name,
            "model": given.label,
            "steps": 0,
            "training_tokens": 0,
            "train_loss": math.nan,
            "validation_loss": mean_loss(given.model, windows[number], batch=1),
            "diverged_at": -1,
        }
        for number, seed in enumerate(settings.seeds)
    ]
    return kept, rows


def _trained(
    settings: ProbingSettings, text: PreparedText, weights: Path, this: Job
) -> tuple[Kept, list[dict[str, Any]]]:
    """A tokenizer for the text and, of each seed, a model trained on its first 95 % and windows of the rest."""
    shape = Shape.of(settings)
    corpus = corpus_of(settings, text)
    runs = [RunId(STUDY, f"{text.name} windows", seed) for seed in settings.seeds]
    what = f"the last {100 * language.HELD_OUT:g} % of {text.label}"
    windows = language.windows(corpus.held_out, max(settings.lengths), settings.windows, runs, what)
    rows: list[dict[str, Any]] = []
    stages: dict[str, list[dict[str, Tensor]]] = {stage: [] for stage in language.STAGES}
    for seed in settings.seeds:
        learner = Learner(settings, RunId(STUDY, f"{text.name} {shape}", seed), corpus.sequences, this.device)
        stages["untrained"].append(learner.parameters())
        report = fit(
            learner,
            steps=settings.steps,
            checkpoint=_checkpoint(weights, text.name, seed),
            runs=[learner.run],
            fingerprint=fingerprint(
                [settings.model_dump(), text.digest, this.device.type],
                code_version(f"jacnorm.studies.{STUDY}.train_language"),
            ),
            on_divergence="record",
            tracker=this.tracker,
            label=f"{text.name}, seed {seed}",
        )
        stages["trained"].append(learner.parameters())
        (diverged,) = report.diverged
        last = report.history["loss"][-max(1, settings.steps // 10) :, 0].double()
        held_out = sequences(corpus.held_out, settings.context)
        rows.append(
            {
                "seed": seed,
                "data_set": text.name,
                "model": "trained",
                "steps": report.steps,
                "training_tokens": corpus.training_tokens,
                "train_loss": last.mean().item() if diverged is None else math.nan,
                "validation_loss": mean_loss(learner.model, held_out) if diverged is None else math.nan,
                "diverged_at": -1 if diverged is None else diverged,
            }
        )
    stacked = {
        stage: {name: torch.stack([each[name] for each in found]) for name in found[0]}
        for stage, found in stages.items()
    }
    kept = Kept(
        text.name,
        text.label,
        text.digest,
        settings.seeds,
        windows,
        tokenizer=corpus.tokenizer,
        shape=shape,
        parameters=stacked,
    )
    return kept, rows


@dataclass(frozen=True)
class Corpus:
    """A text as tokens."""

    tokenizer: str
    """JSON text of `tokenizers`."""
    training_tokens: int
    sequences: Tensor
    """To train on, (N, context + 1); see `sequences`."""
    held_out: Tensor
    """Tokens of the last 5 % of the text, (n,)."""


def corpus_of(settings: ProbingSettings, text: PreparedText) -> Corpus:
    """Learn a tokenizer from the first 95 % of a text and apply it to both parts.

    Raises UserError if the text is shorter than training needs.
    """
    part, rest = language.split(text.text)
    tokenizer = language.learn_tokenizer(part, settings.vocabulary)
    training, held_out = (language.tokens(tokenizer, each) for each in (part, rest))
    least = settings.batch * settings.context + 1
    if len(training) < least or len(held_out) <= settings.context:
        raise UserError(
            f"{text.label} is too short: it gives {len(training)} tokens to train on and {len(held_out)} held out, but "
            f"batch times context needs {least}, and context {settings.context + 1} held out; take a longer text, or "
            "lower context"
        )
    return Corpus(tokenizer.to_str(), len(training), sequences(training, settings.context), held_out)


def sequences(token_ids: Tensor, length: int) -> Tensor:
    """Tokens (n,) divided into sequences that overlap by one token, (N, length + 1).

    So each token but the first is predicted once; a rest is left out.
    """
    return token_ids.unfold(0, length + 1, length)


class Learner:
    """One GPT-2 that learns to predict the next token: a `jacnorm.training.loop.Trainee`."""

    def __init__(self, settings: ProbingSettings, run: RunId, train: Tensor, device: torch.device) -> None:
        """Draw the initial parameters; `train` are sequences (N, context + 1)."""
        self.generators: dict[str, torch.Generator] = {}
        self.run = run
        # The backward pass of fused attention gives other bits each time on a GPU.
        self.model = language.gpt2(Shape.of(settings), fused=device.type == "cpu")
        language.initialise(self.model, run.generator("weights"))
        self.model.to(device)
        self._train, self._settings, self._device = train, settings, device
        self._frozen = False
        self._optimiser = torch.optim.AdamW(
            self.model.parameters(),
            settings.learning_rate,
            betas=BETAS,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        for parameter in self.model.parameters():  # as the first step would, so that a checkpoint finds them
            self._optimiser.state[parameter] = {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def step(self, index: int) -> dict[str, Tensor]:
        """One update with the next batch."""
        if self._frozen:
            return {"loss": torch.tensor(math.nan)}
        rows = batch_indices(index, [self.run], len(self._train), self._settings.batch, drop_last=True)[0]
        loss = next_token_loss(self.model, self._train[rows].to(self._device))
        self._optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._settings.clip)
        for group in self._optimiser.param_groups:
            group["lr"] = self._settings.learning_rate * one_cycle(index, self._settings.steps)
        self._optimiser.step()
        return {"loss": loss.detach()}

    def freeze(self, diverged: Tensor) -> None:
        """Stop changing if the run has diverged."""
        self._frozen = bool(diverged.item())

    def parameters(self) -> dict[str, Tensor]:
        """Copies of the parameters by name, on the CPU."""
        return {name: values.detach().cpu().clone() for name, values in self.model.named_parameters()}

    def state(self) -> dict[str, Tensor]:
        """Parameters and moments."""
        found = {}
        for name, parameter in self.model.named_parameters():
            found[f"parameter/{name}"] = parameter.detach()
            found |= {f"{moment}/{name}": values for moment, values in self._optimiser.state[parameter].items()}
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""
        for name, values in self.state().items():
            values.copy_(state[name])


def next_token_loss(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of each token given those before it, in nat; tokens (B, L + 1) give B L predictions."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits  # (B, L, V)
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def mean_loss(model: PreTrainedModel, tokens: Tensor, batch: int = EVALUATION_BATCH) -> float:
    """`next_token_loss` over sequences (N, L + 1), `batch` at a time."""
    device = next(model.parameters()).device
    total = sum(next_token_loss(model, part.to(device)).double() * len(part) for part in tokens.split(batch))
    return float(total) / len(tokens)


def one_cycle(index: int, steps: int) -> float:
    """Step size of update `index` (from 0) as a share of the largest: up for 10 % of the steps, then down, in cosines.

    Smith and Topin 2019, with cosines in place of lines; the same numbers as `torch.optim.lr_scheduler.OneCycleLR`.
    """
    peak = WARM_UP * steps - 1
    if index < peak:
        return _cosine(FIRST_SHARE, 1.0, index / peak)
    return _cosine(1.0, LAST_SHARE, (index - peak) / (steps - 1 - peak))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def _checkpoint(weights: Path, text: str, seed: int) -> Path:
    return weights.with_name(f"{weights.stem}-{text}-s{seed}.checkpoint.safetensors")
