"""Settings of the `glstm` study: one class per experiment; the defaults are the `smoke` scale.

N is the number of neighbours (keys) of an associative-recall graph, M the memory dimension of gLSTM, d a width. NAR is
neighbour associative recall, NARR its regression variant, GPP graph property prediction.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from jacnorm.settings import Count, Distinct, Positive, SeededSettings, Seeds, Settings, setting

Device = Literal["auto", "cpu", "cuda"]
Task = Literal["diameter", "eccentricity", "sssp", "laplacian"]
Baseline = Literal["gcn", "gatv2", "gatedgcn"]
Ablation = Literal["no-output-gate", "no-input-gate", "no-forget-gate", "no-gates", "1-hop"]
NoSeeds = Annotated[list[Annotated[int, Field(ge=0)]], Distinct]
Counts = Annotated[list[Count], Distinct]
OneOrMore = Annotated[list[Count], Field(min_length=1), Distinct]
Keys = Annotated[list[Annotated[int, Field(ge=2)]], Field(min_length=1), Distinct]


class TreesSettings(SeededSettings):
    """Jacobians of untrained GCNs on a deep tree and on a star (Fig. 2)."""

    seeds: Seeds = setting(list(range(10, 30)), "one draw of features and weights per seed")
    seeds_per_job: Count = setting(1000, "seeds that share one job", unit="seeds")
    exponents: OneOrMore = setting([1, 2, 3, 4, 5, 6, 7], "binary logarithms of the number of leaves")
    width: Count = setting(4, "width d", unit="units")


class RecallSettings(SeededSettings):
    """Associative recall among the neighbours of one node."""

    seeds: Seeds = setting([10, 11, 12, 13, 14], "one data set and initialisation per seed")
    neighbours: Keys = setting([4, 8, 16, 32], "numbers N of neighbours")
    memories: OneOrMore = setting([8], "memory dimensions M of gLSTM with K-hop; its width is 2 M")
    one_hop_memories: Counts = setting([8], "memory dimensions M of gLSTM without K-hop")
    one_hop_neighbours: Counts = setting([8], "numbers N at which it is trained", unit="neighbours")
    baselines: Annotated[list[Baseline], Distinct] = setting(["gcn"], "other networks, two layers, without K-hop")
    widths: Counts = setting([64], "their widths d", unit="units")
    baselines_k_hop: bool = setting(False, "train the other networks with K-hop too")
    depths: Counts = setting([], "numbers of layers of further GCNs, of the first width", unit="layers")
    depth_neighbours: Counts = setting([], "numbers N at which these are trained", unit="neighbours")
    further_memories: Counts = setting([16], "further memory dimensions, with K-hop, at some N only")
    further_neighbours: Counts = setting([16], "these N", unit="neighbours")
    train_graphs: Count = setting(8000, "training graphs", unit="graphs")
    validation_graphs: Count = setting(1000, "validation graphs", unit="graphs")
    test_graphs: Count = setting(1000, "test graphs", unit="graphs")
    data: Literal["fixed", "fresh"] = setting("fixed", "train on the training graphs, or on new ones in every step")
    fresh_controls: Counts = setting([], "N at which the widest GCN is also trained on new graphs in every step")
    steps: Count = setting(1200, "updates at most", unit="steps")
    batch: Count = setting(64, "graphs per step", unit="graphs")
    learning_rate: Positive = setting(3e-3, "first step size of AdamW, on a cosine to 0")
    schedule: Literal["step", "epoch"] = setting("step", "when the step size changes")
    clip: Positive = setting(1.0, "largest norm of a run's gradient")
    evaluations: Count = setting(8, "times that validation is looked at during training, evenly spaced")
    patience: Annotated[int, Field(ge=0)] = setting(
        0, "looks at the validation set without a better one after which a run ends; 0: never"
    )
    measured_graphs: Count = setting(10, "test graphs for Jacobians", unit="graphs")
    hessian_graphs: Count = setting(3, "test graphs for the mixing Hessian", unit="graphs")


class RegressionSettings(RecallSettings):
    """The same with real vectors to be returned (NARR)."""

    seeds: NoSeeds = setting([], "one data set and initialisation per seed; an empty list leaves the experiment out")


class PropertySettings(SeededSettings):
    """Graph property prediction: distances and diameters of random graphs (GPP)."""

    seeds: Seeds = setting([10, 11, 12], "one data set and initialisation per seed")
    tasks: Annotated[list[Task], Field(min_length=1), Distinct] = setting(
        ["eccentricity"], "what is predicted, named after what the label is"
    )
    archive: str | None = setting(
        None, "the benchmark's own file of graphs (pickle, as published); None generates graphs", private=True
    )
    smallest: Annotated[int, Field(ge=4)] = setting(8, "nodes of the smallest generated graph", unit="nodes")
    largest: Annotated[int, Field(ge=4)] = setting(12, "nodes of the largest generated graph", unit="nodes")
    train_graphs: Count = setting(1000, "training graphs", unit="graphs")
    validation_graphs: Count = setting(200, "validation graphs", unit="graphs")
    test_graphs: Count = setting(200, "test graphs", unit="graphs")
    published: bool = setting(
        False, "take layers, width, heads, memory and activation of each task from the paper instead of from here"
    )
    layers: Count = setting(8, "layers", unit="layers")
    width: Count = setting(16, "width d", unit="units")
    heads: Count = setting(1, "heads of gLSTM")
    memory: Count = setting(8, "memory dimension M of gLSTM")
    activation: Literal["identity", "relu", "tanh"] = setting("relu", "function after the projection down")
    ablations: Annotated[list[Ablation], Distinct] = setting(["1-hop"], "what is taken away from gLSTM, one at a time")
    baselines: Annotated[list[Literal["gcn", "adgn"]], Distinct] = setting([], "other networks")
    steps: Count = setting(240, "updates at most", unit="steps")
    batch: Count = setting(64, "graphs per step", unit="graphs")
    learning_rate: Positive = setting(3e-3, "step size of AdamW")
    weight_decay: Annotated[float, Field(ge=0)] = setting(1e-6, "decoupled weight decay")
    cosine: bool = setting(True, "let the step size fall to 0 on a cosine")
    evaluations: Count = setting(4, "times that validation is looked at during training, evenly spaced")
    patience: Annotated[int, Field(ge=0)] = setting(
        0, "looks at the validation set without a better one after which a run ends; 0: never"
    )

    @model_validator(mode="after")
    def _sizes_are_ordered(self) -> Self:
        if self.largest < self.smallest:
            raise ValueError(f"largest {self.largest} is below smallest {self.smallest}; exchange them")
        return self


class RingSettings(SeededSettings):
    """RingTransfer: one label carried around half a ring, against the number of layers."""

    seeds: NoSeeds = setting([], "one data set and initialisation per seed; an empty list leaves the experiment out")
    layers: OneOrMore = setting([2, 4, 8, 16], "layers, and half the nodes of the ring", unit="layers")
    models: Annotated[list[Literal["glstm", "gcn"]], Field(min_length=1), Distinct] = setting(
        ["glstm", "gcn"], "networks"
    )
    classes: Count = setting(5, "labels", unit="classes")
    width: Count = setting(16, "width d", unit="units")
    memory: Count = setting(8, "memory dimension M of gLSTM")
    train_graphs: Count = setting(2000, "training graphs", unit="graphs")
    test_graphs: Count = setting(500, "test graphs", unit="graphs")
    steps: Count = setting(600, "updates", unit="steps")
    batch: Count = setting(64, "graphs per step", unit="graphs")
    learning_rate: Positive = setting(3e-3, "step size of AdamW, on a cosine to 0")


class PeptidesSettings(SeededSettings):
    """Peptides of the Long Range Graph Benchmark, through PyTorch Geometric."""

    seeds: NoSeeds = setting([], "one initialisation per seed; an empty list leaves the experiment out")
    tasks: Annotated[list[Literal["func", "struct"]], Field(min_length=1), Distinct] = setting(
        ["func", "struct"],
        "ten functional classes (average precision), or eleven structural numbers (mean absolute error)",
    )
    ablations: Annotated[list[Ablation], Distinct] = setting([], "what is taken away from gLSTM, one at a time")
    parameters: Count = setting(500_000, "most parameters of a network, which decides its width", unit="parameters")
    epochs: Count = setting(1500, "passes over the training graphs at most", unit="epochs")
    patience: Count = setting(100, "epochs without a better validation after which a run ends", unit="epochs")
    batch: Count = setting(64, "graphs per step", unit="graphs")
    learning_rate: Positive = setting(1e-3, "step size of AdamW, halved on a plateau of 20 epochs, at least 1e-5")


class StudySettings(Settings):
    """All experiments of the study."""

    trees: TreesSettings = setting(TreesSettings(), "Jacobians of untrained networks, deep against wide")
    nar: RecallSettings = setting(RecallSettings(), "neighbour associative recall")
    narr: RegressionSettings = setting(RegressionSettings(), "its regression variant")
    gpp: PropertySettings = setting(PropertySettings(), "graph property prediction")
    ring: RingSettings = setting(RingSettings(), "RingTransfer")
    peptides: PeptidesSettings = setting(PeptidesSettings(), "Peptides of the Long Range Graph Benchmark")
