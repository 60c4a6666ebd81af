"""What tests of training and measuring share: small data, and calls of the steps as rules make them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from jacnorm.data.read import read
from jacnorm.data.stored import pack
from jacnorm.files import read_table, save_tensors
from jacnorm.settings import flags
from jacnorm.step import run
from jacnorm.studies.fedgtst import measure_federated, train_federated
from jacnorm.studies.fedgtst.settings import DOMAINS, FederatedSettings
from jacnorm.training import snapshots

METHODS = ["fedavg", "fedsr", "fedgtst"]
TINY = FederatedSettings(
    seeds=[10, 11], clients=[3], client_samples=20, methods=METHODS, rounds=4, batch=8, measure_every=3,
    ablation_clients=3, target_samples=60, fine_tuning_epochs=2,
)  # fmt: skip
PREFIXES = {"federated": "federated", "images": "image", "domains": "domain"}


def store(path: Path, name: str, tensors: dict[str, torch.Tensor], classes: int, pixel_max: int = 255) -> Path:
    """A file as the data step writes it."""
    about = {
        "name": name, "label": name, "classes": [str(each) for each in range(classes)], "pixel_max": pixel_max,
        "split": "", "digest": f"digest of {name}", "source": "embedded", "revision": "", "licence": "",
    }  # fmt: skip
    save_tensors(path, tensors, pack(about))
    return path


def coloured(digits: Path, folder: Path) -> list[Path]:
    """The digits, and as their target the same in negative colours."""
    stored = asdict(read(digits))
    tensors = {}
    for part in ("train", "test"):
        grey = stored[part]["x"].int() * 15
        tensors[f"{part}_x"] = torch.cat([255 - grey, grey, 255 - grey], 1).to(torch.uint8)
        tensors[f"{part}_y"] = stored[part]["y"].clone()
    return [digits, store(folder / "digits_m.safetensors", "digits_m", tensors, 10)]


def domain_files(folder: Path, classes: int = 3, size: int = 8) -> list[Path]:
    """Random images of the six domains."""
    files = []
    for number, domain in enumerate(DOMAINS):
        stream = torch.Generator().manual_seed(number)
        tensors = {}
        for part in ("train", "test"):
            tensors[f"{part}_x"] = torch.randint(256, (30, 3, size, size), generator=stream).to(torch.uint8)
            tensors[f"{part}_y"] = torch.arange(30) % classes
        name = f"domainnet_{domain}"
        files.append(store(folder / f"{name}.safetensors", name, tensors, classes))
    return files


def call(step, command, folder, data, settings):
    """Run one command of a step."""
    before = torch.get_deterministic_debug_mode()
    files = ["--tables", str(folder), "--weights", str(folder / "weights.safetensors"), "--device", "cpu"]
    functions = {name: getattr(step, name) for name in PREFIXES}
    try:
        run(functions, [command, *files, "--data", *map(str, data), *flags(settings).split()])
    finally:
        torch.set_deterministic_debug_mode(before)


def tables(folder, command, settings, *names):
    """Tables of a command's block of seeds."""
    block = f"s{min(settings.seeds)}-{max(settings.seeds)}"
    return [read_table(folder / f"{PREFIXES[command]}_{name}-{block}.parquet") for name in names]


def train(folder, data, settings=TINY, command="federated"):
    """Runs, rounds and clients, and what was kept."""
    call(train_federated, command, folder, data, settings)
    return *tables(folder, command, settings, "runs", "rounds", "clients"), snapshots.load(
        folder / "weights.safetensors"
    )


def measure(folder, data, settings=TINY, command="federated"):
    """Statistics, transfer and fine-tuning of what was trained in the folder."""
    call(measure_federated, command, folder, data, settings)
    return tables(folder, command, settings, "statistics", "transfer", "fine_tuning")
