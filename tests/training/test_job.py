"""What surrounds a job: the settings that its tracked run may show."""

import contextlib

from jacnorm.settings import Settings, setting
from jacnorm.training import job as module
from jacnorm.training.tracking import Tracker


class Probe(Settings):
    model: str = setting("owner/model", "what to probe", private=True)
    width: int = setting(3, "how wide")


def test_the_tracked_run_gets_the_settings_without_folders_of_the_user(monkeypatch):
    runs = []

    @contextlib.contextmanager
    def track(*arguments):
        runs.append(arguments)
        yield Tracker()

    monkeypatch.setattr(module, "track", track)
    for model in ("/home/someone/model", "owner/model"):
        with module.job("attention", "measure", "probing", Probe(model=model), "cpu") as running:
            assert running.device.type == "cpu"
    name = ("attention", "measure", "attention measure probing")
    config = {"command": "probing", "device": "cpu", "width": 3}
    assert runs == [(*name, config | {"model": shown}) for shown in ("model", "owner/model")]
