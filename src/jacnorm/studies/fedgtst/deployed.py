"""The apps that `flwr run` starts on machines of their own: options of the run, and the samples that a node holds.

The folder `federated_app` of the project names them; docs/federated.md says how to start everything.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from torch import Tensor

from jacnorm.data.prepare import prepare
from jacnorm.errors import UserError
from jacnorm.files import load_tensors, save_tensors, write_json
from jacnorm.settings import Count, Positive, setting
from jacnorm.studies.fedgtst.algorithm import Tensors
from jacnorm.studies.fedgtst.flower import JacnormStrategy, NodeConfig, Outcome, client_app, server_app
from jacnorm.studies.fedgtst.flower_api import ClientApp, Context, ServerApp
from jacnorm.studies.fedgtst.inputs import load
from jacnorm.studies.fedgtst.plan import Plan
from jacnorm.studies.fedgtst.settings import EnginesSettings, Method, Network, TrainingSettings
from jacnorm.studies.fedgtst.splits import clients as split_clients
from jacnorm.studies.fedgtst.strategies import part
from jacnorm.training.progress import step_logger

DIGITS = "digits"
"""Data that every node has: they come with scikit-learn."""
_log = logging.getLogger(__name__)


class DeployedSettings(TrainingSettings):
    """A run on machines of their own.

    A Flower app's options are single values that are always given: `seeds` cannot be among them.
    """

    seed: int = setting(10, "random seed of start, participants and batches", ge=0)
    method: Method = setting("fedgtst", "method")
    coefficient: float = setting(1e-3, "xi, rho or the factor of fedsr's regularisers; 0 for other methods", ge=0)
    network: Network = setting("lenet", "network")
    clients: Count = setting(2, "clients K: SuperNodes with partition-id 0 .. K - 1", unit="clients")
    data: str = setting(DIGITS, "digits, of which each node takes its part; or a name for what the nodes hold")
    pixels: Count = setting(8, "height and width of an image", unit="pixels")
    classes: Count = setting(10, "number of classes")
    folder: str = setting("federated", "where the server writes, seen from where the SuperLink was started")
    timeout: Positive = setting(3600.0, "until a client that has not answered is dropped for the round", unit="s")

    @property
    def plan(self) -> Plan:
        """What the clients are told."""
        shape = (3, self.pixels, self.pixels)
        return Plan(
            self, self.seed, self.data, self.clients, self.method, self.coefficient, self.network, shape, self.classes
        )


def client() -> ClientApp:
    """The app of a SuperNode."""
    return client_app(samples)


def server() -> ServerApp:
    """The app of the SuperLink.

    It leaves in `folder`: server.safetensors, from which a run that was killed goes on; weights.safetensors, the final
    weights; outcome.json, what came of the run and what each round did.
    """

    def strategy(context: Context) -> JacnormStrategy:
        nonlocal folder
        step_logger()
        settings = DeployedSettings.model_validate(dict(context.run_config))
        folder = Path(settings.folder)
        return JacnormStrategy(settings.plan, folder / "server.safetensors", timeout=settings.timeout)

    def done(end: Outcome) -> None:
        save_tensors(folder / "weights.safetensors", part("weights", end.server))
        write_json(folder / "outcome.json", {"outcome": end.outcome, "rounds": end.history})
        _log.info("%s after round %d", end.outcome, len(end.history))

    folder = Path()
    return server_app(strategy, done)


def samples(plan: Plan, client: int, node: NodeConfig) -> tuple[Tensor, Tensor]:
    """A node's samples: tensors x and y of the safetensors file that its configuration names as `data`; or its part of
    the digits.

    Raises UserError if the file is missing, damaged or without one of them, or if a run on other data than the digits
    names none.
    """
    if "data" in node:
        tensors, _ = load_tensors(str(node["data"]))
        return _tensor("x", tensors, node), _tensor("y", tensors, node)
    if plan.data != DIGITS:
        raise UserError(
            f"client {client} has no samples of \"{plan.data}\": add data='FILE.safetensors' to its --node-config"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.safetensors"
        prepare(DIGITS, path)
        (source,) = load(EnginesSettings(), [path])
        train = source.source_train
        split = plan.settings.split
        rows = split_clients(plan.settings, plan.clients, split, plan.seed, train.y, source.classes)[client]
        return train.take(rows), train.y[rows]


def _tensor(name: str, tensors: Tensors, node: NodeConfig) -> Tensor:
    if name not in tensors:
        raise UserError(f"{node['data']} has no tensor {name}, but {', '.join(sorted(tensors)) or 'none'}: add it")
    return tensors[name]
