"""Settings of the `attention` study: one class per experiment; the defaults are the `smoke` scale.

L is the length of a text window or the number of keys of a row, N the number of selected keys, T the temperature.
Algorithms 1-5 are those of the paper's Appendix B.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from jacnorm.settings import Count, Distinct, Positive, SeededSettings, Seeds, Settings, setting

Device = Literal["auto", "cpu", "cuda"]
Text = Literal["python_docs", "tinyshakespeare", "text"]
Space = Literal["embedding", "wte", "layer_input", "value"]
Normaliser = Literal["softmax", "ssmax", "sparsemax", "entmax15", "sigmoid", "sa-softmax"]
Counts = Annotated[list[Count], Field(min_length=1), Distinct]
Positives = Annotated[list[Positive], Field(min_length=1), Distinct]


class RowSettings(SeededSettings):
    """What is measured on rows of attention."""

    distance_selected: Count = setting(5, "selected keys N of the sweep over lengths (Alg. 1)", unit="keys")
    selected: Counts = setting(
        [1, 2, 4, 5, 8, 16, 32, 64, 96], "selected keys N of the other sweeps (Alg. 2-4)", unit="keys"
    )
    fractions: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1), Distinct] = setting(
        [0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98],
        "shares of the visible keys that are selected, in rows of the last quarter",
    )
    distance: Literal["sum_of_norms", "norm_of_sum"] = setting(
        "sum_of_norms", "distance to the keys left out: sum of norms, or norm of the sum"
    )
    normalisers: Annotated[list[Normaliser], Field(min_length=1), Distinct] = setting(
        ["softmax", "ssmax", "sparsemax", "entmax15", "sigmoid", "sa-softmax"], "normalisers applied to the same logits"
    )
    temperatures: Positives = setting(
        [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0], "temperatures T of the sensitivity (Alg. 5)"
    )
    perturbations: Positives = setting([1e-3, 1e-1, 10.0], "lengths epsilon of the perturbation of the logits (Alg. 5)")
    subsets: Count = setting(16, "random subsets of a row for the Monte-Carlo expectation", unit="subsets")
    subset_rows: Count = setting(8, "rows of a head for which it is computed", unit="rows")
    gradient_rows: Count = setting(
        32, "rows of a head in which gradients of other normalisers than softmax are measured", unit="rows"
    )

    @model_validator(mode="after")
    def _has_softmax(self) -> Self:
        if "softmax" not in self.normalisers:
            raise ValueError("normalisers lacks softmax, with which the others are compared; add it")
        return self


class ProbingSettings(RowSettings):
    """Attention rows of a causal language model: distances, separability, sensitivity (Fig. 2-4)."""

    seeds: Seeds = setting(
        [10, 11, 12, 13, 14], "one trained model with its text windows per seed; windows only of a given model"
    )
    data_sets: Annotated[list[Text], Field(min_length=1), Distinct] = setting(["python_docs"], "texts")
    model: str | None = setting(
        None,
        "causal language model to probe: its id on the Hugging Face hub or a local folder; None trains a small GPT-2",
        private=True,
    )
    layers: Count = setting(4, "layers of the small GPT-2", unit="layers")
    heads: Count = setting(4, "heads of each layer", unit="heads")
    width: Count = setting(64, "width of the residual stream, a multiple of heads", unit="units")
    context: Count = setting(128, "longest context, and length of training sequences", unit="tokens")
    vocabulary: Annotated[int, Field(ge=257)] = setting(512, "byte-level BPE tokens", unit="tokens")
    steps: Count = setting(200, "updates", unit="steps")
    batch: Count = setting(4, "sequences per step", unit="sequences")
    learning_rate: Positive = setting(3e-3, "largest step size of AdamW, one cycle with 10 % warm-up")
    weight_decay: Annotated[float, Field(ge=0)] = setting(0.01, "decoupled weight decay")
    clip: Positive = setting(1.0, "largest norm of the gradient")
    control: bool = setting(True, "also probe the model as it was before training, with softmax only")
    windows: Count = setting(1, "text windows per seed", unit="windows")
    lengths: Counts = setting([16, 32, 64, 128], "window lengths L (Alg. 1)", unit="tokens")
    spaces: Annotated[list[Space], Field(min_length=1), Distinct] = setting(
        ["embedding", "wte", "layer_input", "value"],
        "vectors x of the tokens, the first in all sweeps: embedding with and without position, layer input, value",
    )
    normalised: bool = setting(True, "scale every x to length 1")
    keys: Literal["visible", "all"] = setting("visible", "keys of a row: itself and those before, or the whole window")
    scaled: bool = setting(True, "logits over the root of the head's width: the model's own temperature is 1")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}; change one")
        if self.model is None and max(self.lengths) > self.context:
            raise ValueError(f"lengths asks for {max(self.lengths)} tokens, but context is {self.context}; enlarge it")
        return self


class SyntheticSettings(RowSettings):
    """Rows with known geometry: unit vectors with a mean cosine, Gaussian logits, no mask."""

    seeds: Seeds = setting(list(range(10, 15)), "one set of rows per seed")
    selected: Counts = setting(
        [1, 2, 4, 8, 16, 32, 64, 100, 256, 512], "selected keys N of the other sweeps", unit="keys"
    )
    lengths: Counts = setting([32, 64, 128, 256, 512, 1024], "keys L of a row", unit="keys")
    dimension: Count = setting(64, "dimension of the vectors", unit="dimensions")
    cosine: Annotated[float, Field(ge=0, lt=1)] = setting(0.3, "mean cosine between two vectors")
    spread: Positive = setting(3.0, "mean standard deviation of logits; a head's is 0.5 to 1.5 times it")
    heads: Count = setting(24, "sets of vectors and logits", unit="heads")
    rows: Count = setting(1, "rows of each", unit="rows")


class StudySettings(Settings):
    """All experiments of the study."""

    probing: ProbingSettings = setting(ProbingSettings(), "rows of a language model")
    synthetic: SyntheticSettings = setting(SyntheticSettings(), "rows with known geometry")
