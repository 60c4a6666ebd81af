"""Settings of the `fedgtst` study: one class per experiment; the defaults are the `smoke` scale.

K is the number of clients, P that of rounds, xi the weight of FedGTST's penalty (||J|| - guide)^2 and rho that of
FedIIR's. J is the gradient of the loss by all weights, not an input-output Jacobian.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from jacnorm.settings import Count, Distinct, Positive, SeededSettings, Seeds, Settings, setting

Device = Literal["auto", "cpu", "cuda"]
Pair = Literal["digits", "mnist", "cifar10", "domainnet"]
Method = Literal["fedavg", "fedsr", "fediir", "scaffold", "fedgtst", "fedgtst-mean"]
Network = Literal["lenet", "resnet18"]
Split = Literal["paper", "balanced", "dirichlet"]
Schedule = Literal["constant", "warmup", "decay"]
Share = Annotated[float, Field(gt=0, le=1)]
NoSeeds = Annotated[list[Annotated[int, Field(ge=0)]], Distinct]
Positives = Annotated[list[Positive], Field(min_length=1), Distinct]
Counts = Annotated[list[Count], Distinct]
Methods = Annotated[list[Method], Field(min_length=1), Distinct]

TARGETS = {"digits": "digits_m", "mnist": "mnist_m", "cifar10": "svhn"}
"""The target of each source; every domain of DomainNet is the target of the other five."""
DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")


class BoundsSettings(SeededSettings):
    """The descent inequalities on convex softmax regression, in float64 (Lemma B.3, Theorem 2, Appendix E)."""

    seeds: Seeds = setting(list(range(10, 15)), "one split and start per seed")
    data_set: Literal["digits"] = setting("digits", "data set")
    clients: Count = setting(10, "clients K", unit="clients")
    client_samples: Count = setting(120, "samples of each client, of two classes", unit="samples")
    rounds: Count = setting(200, "rounds P", unit="rounds")
    fixed_rates: Positives = setting([0.5, 1.0, 1.9], "step sizes beside the optimal one, in units of 1 / alpha")


class TrainingSettings(SeededSettings):
    """One federated training: its split, its clients and their updates."""

    client_samples: Count = setting(120, "samples of each client", unit="samples")
    split: Split = setting(
        "balanced",
        "two classes a client, drawn independently (paper) or so that each class has as many clients (balanced); or "
        "dirichlet",
    )
    concentration: Positive = setting(0.5, "concentration of the Dirichlet split")
    participation: Share = setting(1.0, "share of the clients that take part in a round")
    local_epochs: Count = setting(1, "passes over a client's samples in a round", unit="epochs")
    rounds: Count = setting(40, "rounds P", unit="rounds")
    batch: Count = setting(32, "samples per step", unit="samples")
    optimiser: Literal["sgd", "adam"] = setting("sgd", "of the clients, started anew in every round")
    learning_rate: Positive = setting(0.1, "step size of the clients, divided by 10 every decay_rounds")
    decay_rounds: Count = setting(50, "rounds between two divisions of the step size", unit="rounds")
    schedule: Schedule = setting(
        "constant", "xi over the rounds: constant (paper), linear warmup, or cosine decay to 0, over schedule_rounds"
    )
    schedule_rounds: Count = setting(20, "rounds of that warmup or decay", unit="rounds")
    extra_share: Annotated[float, Field(ge=0, le=1)] = setting(
        0.1, "share of all clients, drawn among the participants, that also train without penalty for the guide"
    )
    guide_at: Literal["local_end", "global_start", "batch_mean"] = setting(
        "local_end",
        "where a client's norm is taken, over all its samples: after its training, before it; or the mean over its "
        "batches",
    )
    minimum_clients: Share = setting(0.5, "share of a round's participants that must answer")
    runaway: Positive = setting(100.0, "guide over its first value from which a run counts as unstable and ends")

    def samples_each(self, clients: int) -> int:
        """Samples that each of `clients` clients holds."""
        return self.client_samples


class EnginesSettings(TrainingSettings):
    """The same rounds by the batched engine, by a plain loop and by Flower in one process."""

    seeds: Seeds = setting([10], "one split and start per seed")
    data_set: Literal["digits"] = setting("digits", "data set")
    clients: Count = setting(4, "clients K", unit="clients")
    client_samples: Count = setting(60, "samples of each client, unless total_samples is given", unit="samples")
    methods: Methods = setting(["fedavg", "fedsr", "fediir", "scaffold", "fedgtst"], "methods")
    coefficient: Positive = setting(1e-3, "xi of FedGTST and rho of FedIIR")
    rounds: Count = setting(3, "rounds P", unit="rounds")


class FederatedSettings(TrainingSettings):
    """Federated training on a source, then a new read-out on the target (Tables 1-5, 7-10, Fig. 1, 2).

    Every method runs at every K; alternatives (participation, local epochs, split, extra share) come one at a time, at
    ablation_clients by ablation_methods. Of a method's coefficients the one best in target validation is compared.
    """

    seeds: Seeds = setting([10, 11, 12], "paired seeds: one split, start, batch order and fine-tuning for every method")
    pair: Pair = setting(
        "digits", "source; its target: digits_m, mnist_m (digits on photos), svhn, or the other domains"
    )
    networks: Annotated[list[Network], Field(min_length=1), Distinct] = setting(["lenet"], "networks")
    clients: Annotated[list[Count], Field(min_length=1), Distinct] = setting(
        [10], "numbers of clients K", unit="clients"
    )
    total_samples: Count | None = setting(
        None, "samples of all clients together, divided equally among them, instead of client_samples", unit="samples"
    )
    methods: Methods = setting(["fedavg", "fedsr", "fediir", "fedgtst", "fedgtst-mean"], "methods compared")
    coefficients: Positives = setting([1e-3], "xi of fedgtst")
    mean_coefficients: Positives = setting([1e-2], "xi of fedgtst-mean, whose guide is the mean of the clients' norms")
    fediir_coefficients: Positives = setting([1e-3], "rho of fediir")
    fedsr_coefficients: Positives = setting([1.0], "factor of fedsr's two regularisers (0.01 and 0.0005)")
    ablation_clients: Count = setting(10, "K of the alternatives", unit="clients")
    ablation_methods: Methods = setting(["fedavg", "fedgtst"], "methods of the alternatives")
    participations: Annotated[list[Share], Distinct] = setting([], "alternative shares of the clients in a round")
    epochs: Counts = setting([], "alternative passes over a client's samples in a round", unit="epochs")
    splits: Annotated[list[Split], Distinct] = setting([], "alternative splits")
    extra_shares: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Distinct] = setting(
        [], "alternative extra_share"
    )
    runs_together: Count = setting(32, "runs of one method, at most, that advance together", unit="runs")
    measure_every: Count = setting(4, "rounds between two measurements of all clients", unit="rounds")
    target_samples: Count | None = setting(None, "training samples of the target; None takes all", unit="samples")
    validation_share: Annotated[float, Field(gt=0, lt=1)] = setting(
        0.2, "share of the target's training samples held out to choose a coefficient"
    )
    fine_tuning_epochs: Count = setting(30, "passes over the target's training samples", unit="epochs")
    fine_tuning_batch: Count = setting(32, "samples per step of fine-tuning", unit="samples")
    fine_tuning_rate: Positive = setting(5e-3, "step size of fine-tuning (Adam)")
    fine_tuning_decay: Annotated[float, Field(ge=0)] = setting(1e-4, "weight decay of fine-tuning")

    def samples_each(self, clients: int) -> int:
        """Samples that each of `clients` clients holds."""
        return self.client_samples if self.total_samples is None else self.total_samples // clients

    @property
    def data_sets(self) -> list[str]:
        """Names of the data sets that the experiment reads, the source first."""
        if self.pair == "domainnet":
            return [f"domainnet_{domain}" for domain in DOMAINS]
        return [self.pair, TARGETS[self.pair]]

    @model_validator(mode="after")
    def _alternatives_are_other(self) -> Self:
        for name, values in {
            "participation": self.participations,
            "local_epochs": self.epochs,
            "split": self.splits,
            "extra_share": self.extra_shares,
        }.items():
            if getattr(self, name) in values:
                raise ValueError(
                    f"{name} is {getattr(self, name)} already, so it cannot be an alternative; leave it out"
                )
        if self.pair == "domainnet" and self.clients != [len(DOMAINS) - 1]:
            raise ValueError(f"clients is {self.clients}, but DomainNet has {len(DOMAINS) - 1} source domains; set [5]")
        return self


class ImageSettings(FederatedSettings):
    """The same from CIFAR-10 to SVHN."""

    seeds: NoSeeds = setting([], "paired seeds; none at this scale: no data for this pair ship with any package")
    pair: Pair = setting("cifar10", "source; its target is svhn")


class DomainSettings(FederatedSettings):
    """The same on DomainNet, each domain in turn the target of the other five (Table 6)."""

    seeds: NoSeeds = setting([], "paired seeds; none at this scale: no data for it ship with any package")
    pair: Pair = setting("domainnet", "source domains")
    clients: Annotated[list[Count], Field(min_length=1), Distinct] = setting(
        [5], "one client per domain", unit="clients"
    )


class StudySettings(Settings):
    """All experiments of the study."""

    bounds: BoundsSettings = setting(BoundsSettings(), "descent inequalities of convex softmax regression")
    engines: EnginesSettings = setting(EnginesSettings(), "agreement of the engines")
    federated: FederatedSettings = setting(FederatedSettings(), "transfer from digits to digits on photos")
    images: ImageSettings = setting(ImageSettings(), "transfer from CIFAR-10 to SVHN")
    domains: DomainSettings = setting(DomainSettings(), "transfer between the domains of DomainNet")
