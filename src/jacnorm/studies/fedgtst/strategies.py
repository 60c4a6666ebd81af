"""The methods as strategies: what server and clients send each other in a round, and what they do with it.

A round of a strategy, client by client or mapped over clients and runs:

    reply = survey(survey_message(server), x, y)        if surveys is "every" (FedIIR), each participant;
    server = take_survey(server, replies, answered)     if it is "first" (FedGTST), every client, once after `start`
    message = broadcast(server)
    reply, memory = client(message, memory, x, y, draws, extra=...)
    server = aggregate(server, replies, participants, answered)

Messages, replies, servers and memories are flat dicts of tensors with dotted names ("weights.dense1.bias"); replies
reach the server stacked along a first axis of participants. Scalars of the exchange are float64. Names that begin with
"metrics." are for the record only and are no part of the method's traffic. A client whose reply is not finite keeps its
memory and is left out by `answered`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from jacnorm.errors import UserError
from jacnorm.studies.fedgtst import algorithm
from jacnorm.studies.fedgtst.algorithm import Tensors
from jacnorm.studies.fedgtst.networks import Network
from jacnorm.studies.fedgtst.settings import TrainingSettings

GOING_ON, UNSTABLE, DIVERGED = 0, 1, 2
"""Values of a server's "outcome"."""
OUTCOMES = ("finished", "unstable", "diverged")
"""What they are called in the tables."""

Gradient = Callable[[Tensors, Tensor, Tensor, Tensors], tuple[Tensor, Tensor, Tensors]]
"""(weights, x, y, own draws of the batch) -> loss without penalties, norm of the gradient (or NaN), direction."""


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors under "<prefix>.<name>"."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def part(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors named "<prefix>.<name>", under <name>."""
    start = f"{prefix}."
    return {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}


def payload_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of a message or reply: values without names and without metrics."""
    sent = [tensor for name, tensor in tensors.items() if not name.startswith("metrics.")]
    return sum(tensor.numel() * tensor.element_size() for tensor in sent)


def finite(tensors: Mapping[str, Tensor]) -> Tensor:
    """Whether all numbers are finite, () bool; map it over replies for (k,)."""
    return torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).all()


def choose(condition: Tensor, yes: Tensors, no: Tensors) -> Tensors:
    """`yes` where `condition` () holds, else `no`, name by name."""
    return {name: torch.where(condition, yes[name], no[name]) for name in yes}


class Strategy:
    """FedAVG (McMahan et al. 2017), and what all methods share: local training on the loss, plain mean of weights.

    coefficient: xi, rho or FedSR's factor of this run; 0 for methods without one.
    """

    surveys: Literal["never", "first", "every"] = "never"
    """Whether clients are asked before training: never, all clients before round 0 as part of the start, or the
    participants of each round."""
    guided = False
    """Whether clients send a norm and the server a guide."""
    probabilistic = False
    """Whether the network must be a probabilistic one."""

    def __init__(self, method: str, coefficient: float, settings: TrainingSettings, network: Network) -> None:
        self.method, self.coefficient, self.settings, self.network = method, coefficient, settings, network

    @property
    def noise_width(self) -> int:
        """Width of the normals that `client` needs in its draws; 0: none."""
        return self.network.feature_width if self.probabilistic else 0

    @property
    def extra_training(self) -> bool:
        """Whether extra clients train a second time; where the norm is taken before training, nothing would change."""
        return self.guided and self.settings.extra_share > 0 and self.settings.guide_at != "global_start"

    def start(self, weights: Tensors, clients: int) -> Tensors:
        """The server's state before round 0, from the initial weights of one network and the number of clients K."""
        device = next(iter(weights.values())).device
        outcome = torch.tensor(GOING_ON, device=device)
        return prefixed("weights", weights) | {"outcome": outcome} | self._extras(weights, clients)

    def memory(self) -> Tensors:
        """What one client keeps to itself between rounds, before its first; {} for most methods."""
        return {}

    def broadcast(self, server: Tensors) -> Tensors:
        """The message to every participant."""
        return prefixed("weights", part("weights", server))

    def survey_message(self, server: Tensors) -> Tensors:
        """The message to clients that are asked before training: the weights."""
        return prefixed("weights", part("weights", server))

    def survey(self, message: Tensors, x: Tensor, y: Tensor) -> Tensors:
        """A client's answer before training."""
        raise ValueError(f"{self.method} does not ask its clients before training")

    def take_survey(self, server: Tensors, replies: Tensors, answered: Tensor) -> Tensors:
        """The server's state after those answers, (k, ...); answered: (k,) bool."""
        raise ValueError(f"{self.method} does not ask its clients before training")

    def draws(self, index: int) -> Tensors:
        """What a client must know in round `index` that is not random: "rate" and "coefficient", () float32."""
        coefficient = self.coefficient * algorithm.schedule(self.settings, index)
        rate = algorithm.learning_rate(self.settings, index)
        return {"rate": torch.tensor(rate), "coefficient": torch.tensor(coefficient)}

    def client(
        self, message: Tensors, memory: Tensors, x: Tensor, y: Tensor, draws: Tensors, *, extra: bool = False
    ) -> tuple[Tensors, Tensors]:
        """One client's round: its reply and its new memory.

        x: (n, 3, h, w). y: (n,). draws: `draws.client_draws` and `Strategy.draws` of the round. extra: also train
        without penalty (Phi). Pure; can be mapped over clients and runs.
        """
        reply, new = self._client(message, memory, x, y, draws)
        if extra and self.extra_training:
            reply["norm"] = torch.maximum(reply["norm"], self.extra_norm(message, x, y, draws))
        return reply, choose(finite(reply), new, memory) if memory else memory

    def extra_norm(self, message: Tensors, x: Tensor, y: Tensor, draws: Tensors) -> Tensor:
        """Norm of a client that trains without penalty from the same weights (step C for Phi), () float64."""
        raise ValueError(f"{self.method} has no extra training")

    def aggregate(self, server: Tensors, replies: Tensors, participants: int, answered: Tensor) -> Tensors:
        """The server's state after a round.

        replies: (k, ...) of those whose answer arrived; participants: how many were asked; answered: (k,) bool, false
        for replies to leave out. With fewer than `minimum_clients` of the participants the state stays and "outcome"
        becomes DIVERGED; with a guide above `runaway` times its first value it becomes UNSTABLE.
        """
        enough = answered.sum() >= math.ceil(self.settings.minimum_clients * participants)
        weights = {
            name: algorithm.unweighted_mean(tensor, answered)
            for name, tensor in replies.items()
            if name.startswith("weights.")
        }
        new = {**server, **weights, **self._aggregate_extras(server, replies, answered)}
        new = choose(enough, new, server)
        ended = torch.where(enough, self._outcome(new), torch.full_like(server["outcome"], DIVERGED))
        new["outcome"] = torch.where(server["outcome"] == GOING_ON, ended, server["outcome"])
        return new

    def loss(self, weights: Tensors, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy, what every method starts from."""
        return algorithm.cross_entropy(self.network.logits(weights, x), y)

    def norm(self, weights: Tensors, x: Tensor, y: Tensor) -> Tensor:
        """||J|| of a client over all its samples, () float64."""
        return algorithm.gradient_norm(algorithm.full_gradient(self.loss, weights, x, y)).double()

    def _extras(self, weights: Tensors, clients: int) -> Tensors:
        return {}

    def _aggregate_extras(self, server: Tensors, replies: Tensors, answered: Tensor) -> Tensors:
        return {}

    def _outcome(self, server: Tensors) -> Tensor:
        return torch.full_like(server["outcome"], GOING_ON)

    def _client(
        self, message: Tensors, memory: Tensors, x: Tensor, y: Tensor, draws: Tensors
    ) -> tuple[Tensors, Tensors]:
        trained, loss, _ = self._train(self._plain, part("weights", message), x, y, draws)
        return prefixed("weights", trained) | {"metrics.loss": loss}, memory

    def _plain(self, weights: Tensors, x: Tensor, y: Tensor, draws: Tensors) -> tuple[Tensor, Tensor, Tensors]:
        gradient, value = torch.func.grad_and_value(self.loss)(weights, x, y)
        return value, torch.full_like(value, math.nan), gradient

    def _train(
        self, direction: Gradient, weights: Tensors, x: Tensor, y: Tensor, draws: Tensors, order: str = "order"
    ) -> tuple[Tensors, Tensor, Tensor]:
        """Local epochs from `weights`; the trained weights, and loss and norm averaged over samples, float64."""
        step = algorithm.STEPS[self.settings.optimiser]
        state: Tensors = {}
        losses, norms = [], []
        for number, (samples, own) in enumerate(self._batches(draws, order), 1):
            value, norm, gradient = direction(weights, x[samples], y[samples], own)
            losses.append(value.double() * len(samples))
            norms.append(norm.double() * len(samples))
            weights, state = step(weights, gradient, state, draws["rate"], number)
        seen = draws[order].numel()
        return weights, torch.stack(losses).sum() / seen, torch.stack(norms).sum() / seen

    def _batches(self, draws: Tensors, order: str) -> Iterator[tuple[Tensor, Tensors]]:
        """The samples of each batch, (B,), and its share of the noise, (B, d)."""
        epochs, n = draws[order].shape
        for epoch in range(epochs):
            for start in range(0, n, self.settings.batch):
                stop = min(n, start + self.settings.batch)
                own = {"noise": draws["noise"][epoch, start:stop]} if "noise" in draws else {}
                yield draws[order][epoch, start:stop], own


class FedSR(Strategy):
    """FedSR (Nguyen, Torr and Lim 2022). Each client learns and keeps its own reference r_mu, r_sigma and scale."""

    probabilistic = True

    def memory(self) -> Tensors:
        """r_mu = 0, r_sigma = 1 (before softplus), (C, d), and scale = 1, as in the authors' code."""
        shape = (self.network.classes, self.network.feature_width)
        return {"r_mu": torch.zeros(shape), "r_sigma": torch.ones(shape), "scale": torch.ones(())}

    def _client(
        self, message: Tensors, memory: Tensors, x: Tensor, y: Tensor, draws: Tensors
    ) -> tuple[Tensors, Tensors]:
        factor = draws["coefficient"]

        def objective(learnt: Tensors, x: Tensor, y: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
            weights = part("weights", learnt)
            mean, deviation = self.network.distribution(weights, x)
            z = mean + deviation * noise
            loss = algorithm.cross_entropy(self.network.read_out(weights, z), y)
            own = part("memory", learnt)
            return algorithm.fedsr_objective(loss, z, mean, deviation, y, own, factor), loss

        def direction(learnt: Tensors, x: Tensor, y: Tensor, own: Tensors) -> tuple[Tensor, Tensor, Tensors]:
            gradient, (_, value) = torch.func.grad_and_value(objective, has_aux=True)(learnt, x, y, own["noise"])
            return value, torch.full_like(value, math.nan), gradient

        start = prefixed("weights", part("weights", message)) | prefixed("memory", memory)
        trained, loss, _ = self._train(direction, start, x, y, draws)
        return prefixed("weights", part("weights", trained)) | {"metrics.loss": loss}, part("memory", trained)


class FedIIR(Strategy):
    """FedIIR (Guo et al. 2023): a penalty draws each client's read-out gradient to the server's moving average m."""

    surveys = "every"

    def broadcast(self, server: Tensors) -> Tensors:
        """Weights and m."""
        return super().broadcast(server) | prefixed("mean_head", part("mean_head", server))

    def survey(self, message: Tensors, x: Tensor, y: Tensor) -> Tensors:
        """Gradient of the loss by the read-out at the global weights, over all samples of the client."""
        weights = part("weights", message)
        head = {name: weights[name] for name in self.network.head_names}
        rest = {name: w for name, w in weights.items() if name not in head}
        return prefixed("head", algorithm.full_gradient(lambda own, x, y: self.loss({**rest, **own}, x, y), head, x, y))

    def take_survey(self, server: Tensors, replies: Tensors, answered: Tensor) -> Tensors:
        """New m: 0.95 m + 0.05 (mean of the answers); unchanged if nobody answered."""
        kept = algorithm.ALIGNMENT_KEPT
        new = dict(server)
        for name, gradients in part("head", replies).items():
            old = server[f"mean_head.{name}"]
            moved = kept * old + (1 - kept) * algorithm.unweighted_mean(gradients, answered)
            new[f"mean_head.{name}"] = torch.where(answered.any(), moved, old)
        return new

    def _extras(self, weights: Tensors, clients: int) -> Tensors:
        return prefixed("mean_head", {name: torch.zeros_like(weights[name]) for name in self.network.head_names})

    def _client(
        self, message: Tensors, memory: Tensors, x: Tensor, y: Tensor, draws: Tensors
    ) -> tuple[Tensors, Tensors]:
        mean_head, rho = part("mean_head", message), draws["coefficient"]

        def objective(weights: Tensors, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            z = self.network.features(weights, x)
            head = {name: weights[name] for name in self.network.head_names}
            gradient, loss = torch.func.grad_and_value(
                lambda own: algorithm.cross_entropy(self.network.read_out(own, z), y)
            )(head)
            return algorithm.fediir_objective(loss, gradient, mean_head, rho), loss

        def direction(weights: Tensors, x: Tensor, y: Tensor, own: Tensors) -> tuple[Tensor, Tensor, Tensors]:
            gradient, (_, value) = torch.func.grad_and_value(objective, has_aux=True)(weights, x, y)
            return value, torch.full_like(value, math.nan), gradient

        trained, loss, _ = self._train(direction, part("weights", message), x, y, draws)
        return prefixed("weights", trained) | {"metrics.loss": loss}, memory


class Scaffold(Strategy):
    """Scaffold (Karimireddy et al. 2020): steps along g - c_k + c, with control variates of client and server.

    The client's new variate is the mean of its gradients g over the round. For plain gradient steps that is the
    update c_k - c + (w - y) / (T rate) of the paper (option II); with Adam it keeps its meaning, which the formula
    would not.
    """

    def memory(self) -> Tensors:
        """c_k = 0."""
        return {name: torch.zeros(shape) for name, shape in self.network.shapes.items()}

    def broadcast(self, server: Tensors) -> Tensors:
        """Weights and c."""
        return super().broadcast(server) | prefixed("control", part("control", server))

    def _extras(self, weights: Tensors, clients: int) -> Tensors:
        clients_ = torch.tensor(float(clients), device=next(iter(weights.values())).device)
        return prefixed("control", {name: torch.zeros_like(w) for name, w in weights.items()}) | {"clients": clients_}

    def _client(
        self, message: Tensors, memory: Tensors, x: Tensor, y: Tensor, draws: Tensors
    ) -> tuple[Tensors, Tensors]:
        control = part("control", message)
        seen: list[Tensors] = []

        def direction(weights: Tensors, x: Tensor, y: Tensor, own: Tensors) -> tuple[Tensor, Tensor, Tensors]:
            value, norm, gradient = self._plain(weights, x, y, own)
            seen.append(gradient)
            return value, norm, {name: g - memory[name] + control[name] for name, g in gradient.items()}

        trained, loss, _ = self._train(direction, part("weights", message), x, y, draws)
        new = {name: sum(g[name] for g in seen) / len(seen) for name in memory}
        changes = prefixed("control", {name: new[name] - old for name, old in memory.items()})
        return prefixed("weights", trained) | changes | {"metrics.loss": loss}, new

    def _aggregate_extras(self, server: Tensors, replies: Tensors, answered: Tensor) -> Tensors:
        """New c: c + (clients that answered / K) (mean change of their c_k)."""
        changes = part("control", replies)
        share = answered.sum() / server["clients"]
        return {
            f"control.{name}": server[f"control.{name}"] + share * algorithm.unweighted_mean(change, answered)
            for name, change in changes.items()
        }


class FedGTST(Strategy):
    """FedGTST ("Algorithm 5"): clients train on `algorithm.penalised`, and send their ||J|| beside the weights.

    method "fedgtst": the guide is the largest norm, as published; "fedgtst-mean": the mean norm. Before round 0 all
    clients send their norm at the initial weights, which gives the first guide.
    """

    surveys = "first"
    guided = True

    def broadcast(self, server: Tensors) -> Tensors:
        """Weights and guide."""
        return super().broadcast(server) | {"guide": server["guide"]}

    def survey(self, message: Tensors, x: Tensor, y: Tensor) -> Tensors:
        """||J|| at the initial weights."""
        return {"norm": self.norm(part("weights", message), x, y)}

    def take_survey(self, server: Tensors, replies: Tensors, answered: Tensor) -> Tensors:
        """The first guide."""
        guide = self._guide(replies["norm"], answered)
        return {**server, "guide": guide, "first_guide": guide.clone()}

    def extra_norm(self, message: Tensors, x: Tensor, y: Tensor, draws: Tensors) -> Tensor:
        """Norm after (or over) a training on the loss alone."""

        def direction(weights: Tensors, x: Tensor, y: Tensor, own: Tensors) -> tuple[Tensor, Tensor, Tensors]:
            value, _, gradient = self._plain(weights, x, y, own)
            return value, algorithm.gradient_norm(gradient), gradient

        weights = part("weights", message)
        trained, _, mean_norm = self._train(direction, weights, x, y, draws, "order_extra")
        return self._norm_sent(weights, trained, mean_norm, x, y)

    def _guide(self, norms: Tensor, answered: Tensor) -> Tensor:
        rule = algorithm.mean_guide if self.method == "fedgtst-mean" else algorithm.max_guide
        return rule(norms, answered)

    def _extras(self, weights: Tensors, clients: int) -> Tensors:
        unknown = torch.tensor(math.nan, dtype=torch.float64, device=next(iter(weights.values())).device)
        return {"guide": unknown, "first_guide": unknown.clone()}

    def _client(
        self, message: Tensors, memory: Tensors, x: Tensor, y: Tensor, draws: Tensors
    ) -> tuple[Tensors, Tensors]:
        weights, guide, xi = part("weights", message), message["guide"].float(), draws["coefficient"]

        def direction(weights: Tensors, x: Tensor, y: Tensor, own: Tensors) -> tuple[Tensor, Tensor, Tensors]:
            return algorithm.objective_and_gradient(lambda w: self.loss(w, x, y), weights, xi, guide)

        trained, loss, mean_norm = self._train(direction, weights, x, y, draws)
        norm = self._norm_sent(weights, trained, mean_norm, x, y)
        return prefixed("weights", trained) | {"norm": norm, "metrics.loss": loss}, memory

    def _norm_sent(self, start: Tensors, trained: Tensors, mean_norm: Tensor, x: Tensor, y: Tensor) -> Tensor:
        if self.settings.guide_at == "batch_mean":
            return mean_norm
        return self.norm(trained if self.settings.guide_at == "local_end" else start, x, y)

    def _aggregate_extras(self, server: Tensors, replies: Tensors, answered: Tensor) -> Tensors:
        return {"guide": self._guide(replies["norm"], answered)}

    def _outcome(self, server: Tensors) -> Tensor:
        ran_away = ~(server["guide"] <= self.settings.runaway * server["first_guide"])
        return torch.where(ran_away, UNSTABLE, super()._outcome(server))


_STRATEGIES: dict[str, type[Strategy]] = {
    "fedavg": Strategy,
    "fedsr": FedSR,
    "fediir": FedIIR,
    "scaffold": Scaffold,
    "fedgtst": FedGTST,
    "fedgtst-mean": FedGTST,
}


def is_probabilistic(method: str) -> bool:
    """Whether the method's network must be built with probabilistic=True."""
    return _STRATEGIES[method].probabilistic


def strategy(method: str, coefficient: float, settings: TrainingSettings, network: Network) -> Strategy:
    """The strategy of one run. Raises UserError for an unknown method, ValueError for a network of the wrong kind."""
    if method not in _STRATEGIES:
        raise UserError(f'method "{method}" is unknown: choose one of {", ".join(_STRATEGIES)}')
    kind = _STRATEGIES[method]
    if network.probabilistic != kind.probabilistic:
        raise ValueError(f"{method} needs a network with probabilistic={kind.probabilistic}")
    return kind(method, coefficient, settings, network)
