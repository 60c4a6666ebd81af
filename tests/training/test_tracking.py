from __future__ import annotations

import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.training import wandb_file

from jacnorm.training.tracking import FOLDER_VARIABLE, MODE_VARIABLE, Tracker, track

KEY = "5ec7e7" * 7
USER, HOST = "margarethe-q-tester", "laboratory-host-77"

JOB = """
import json, logging, sys
from pathlib import Path
from PIL import Image
from jacnorm.training.progress import step_logger
from jacnorm.training.tracking import track

step_logger()
home = Path.home()
Image.new("RGB", (4, 3), "red").save(home / "figure.png")
config = {"lr": 0.1, "widths": [64, 128], "net": {"depth": 3}, "mirror": str(home / "data"), "results": home / "out"}
config["long"] = "x" * 70_000  # longer than a block of the run's file
with track("stability", "train", "train-demo", config, folder=sys.argv[1], timeout=2.0) as tracker:
    for step in range(3):
        tracker.log({"first/loss": 1.0 / (step + 1)}, step)
    tracker.log({"second/loss": 7.0}, 0)
    tracker.summary({"accuracy": 0.9, "weights": str(home / "weights.safetensors")})
    tracker.figure("curve", home / "figure.png")
    print(json.dumps(tracker.active))
with track("stability", "measure", "measure-demo", {}, folder=sys.argv[1], mode="offline") as tracker:
    tracker.log({"norm": 2.0}, 0)
"""


@pytest.fixture
def listener() -> Iterator[tuple[int, list[str]]]:
    """A server on this machine that takes connections and never answers; its port and the connections it got."""
    server, connections, kept = socket.create_server(("127.0.0.1", 0)), [], []

    def serve() -> None:
        while True:
            try:
                connection, address = server.accept()
            except OSError:
                return
            kept.append(connection)
            connections.append(str(address))

    thread = threading.Thread(target=serve)
    thread.start()
    yield server.getsockname()[1], connections
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()
    for connection in kept:
        connection.close()


def run_job(folder: Path, home: Path, port: int, mode: str | None) -> subprocess.CompletedProcess[str]:
    """A job of its own process whose user, home and W&B key are known, and whose every way out leads to `port`."""
    (home / "tmp").mkdir(parents=True)
    url = f"http://127.0.0.1:{port}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JACNORM_")}
    environment |= {"HOME": str(home), "USER": USER, "LOGNAME": USER, "USERNAME": USER, "HOSTNAME": HOST}
    environment["TMPDIR"] = str(home / "tmp")  # so that a private place of W&B's that leaks out names the home folder
    environment |= {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": url, "WANDB_USERNAME": USER, "WANDB_NOTES": f"by {USER}"}
    environment |= {name: url for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")}
    environment |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "NO_PROXY": "", "no_proxy": ""}
    if mode is not None:
        environment[MODE_VARIABLE] = mode
    return subprocess.run(
        [sys.executable, "-c", JOB, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def check_records(folder: Path) -> wandb_file.OfflineRun:
    """Check what the two jobs left in `folder`; returns the first one's record."""
    paths = {wandb_file.read(path).run.job_type: path for path in folder.glob("*/*.wandb")}
    assert sorted(paths) == ["measure", "train"]
    assert len(list(folder.iterdir())) == 2
    assert [row["norm"] for row in wandb_file.read(paths["measure"]).history] == [2.0]

    run = wandb_file.read(paths["train"])
    assert (run.run.project, run.run.run_group, run.run.job_type) == ("jacnorm", "stability", "train")
    assert run.run.display_name == "train-demo"
    settings = {key: value for key, value in run.config.items() if key != "_wandb"}
    assert settings == {
        "lr": 0.1, "widths": [64, 128], "net": {"depth": 3}, "mirror": ".../data", "results": ".../out",
        "long": "x" * 70_000,
    }  # fmt: skip
    metrics = [{name: row[name] for name in row if not name.startswith("_")} for row in run.history]
    assert metrics[:3] == [{"first/loss": pytest.approx(1 / (step + 1)), "step": step} for step in range(3)]
    assert metrics[3] == {"second/loss": 7.0, "step": 0}
    assert metrics[4]["curve._type"] == "image-file", metrics[4]
    assert (run.summary["accuracy"], run.summary["weights"]) == (0.9, ".../weights.safetensors")
    assert run.exit_code == 0
    assert len(list(paths["train"].parent.glob("files/media/images/curve*.png"))) == 1
    return run


def test_an_offline_run_holds_everything_and_names_nobody(tmp_path, listener):
    port, connections = listener
    home, folder = tmp_path / USER, tmp_path / "wandb"
    done = run_job(folder, home, port, mode=None)
    assert done.stdout == "true\n"
    assert done.stderr == ""
    run = check_records(folder)
    assert connections == []

    assert run.run.host == ""
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", run.text)
    private = [KEY, USER, HOST, str(tmp_path), str(Path.home()) + "/", sys.executable, *_long(socket.gethostname())]
    for path in folder.rglob("*"):
        assert not path.is_symlink()
        for secret in private:
            assert secret not in str(path.relative_to(folder))
            assert path.is_dir() or secret.encode() not in path.read_bytes(), (path, secret)
    left = sorted(str(path.relative_to(home)) for path in home.rglob("*"))
    assert left == ["figure.png", "tmp"]  # no caches or settings at home


def _long(name: str) -> list[str]:
    return [name] if len(name) > 5 else []  # short names occur in any binary file by chance


def test_an_online_run_that_gets_no_answer_is_recorded_offline(tmp_path, listener):
    port, connections = listener
    home, folder = tmp_path / USER, tmp_path / "wandb"
    done = run_job(folder, home, port, mode="online")
    assert done.stdout == "true\n"
    (warning,) = [line for line in done.stderr.splitlines() if "Weights & Biases" in line]
    assert "the online run is recorded offline (`wandb sync` uploads it later)" in warning
    assert KEY not in done.stderr
    assert connections  # so the listener does see W&B's attempts, and saw none offline
    check_records(folder)
    assert all(KEY.encode() not in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_nothing_is_imported_or_written_when_disabled(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setenv(MODE_VARIABLE, "disabled")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "wandb"))
    with track("s", "train", "n", {}) as tracker:
        use(tracker)
    assert not tracker.active
    assert not list(tmp_path.iterdir())


def use(tracker: Tracker) -> None:
    tracker.log({"loss": 1.0}, 0)
    tracker.summary({"accuracy": 0.5})
    tracker.figure("curve", "figure.png")


def warnings(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


def test_without_wandb_a_job_gets_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with track("s", "train", "n", {}, mode="offline", folder=tmp_path) as tracker:
        use(tracker)
    (warning,) = warnings(caplog)
    assert warning.startswith("Weights & Biases: nothing is recorded (ModuleNotFoundError: ")


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path, caplog):
    (tmp_path / "file").touch()
    with track("s", "train", "n", {}, mode="offline", folder=tmp_path / "file" / "wandb") as tracker:
        use(tracker)
    (warning,) = warnings(caplog)
    assert warning.startswith("Weights & Biases: nothing is recorded (NotADirectoryError: ")


def test_an_unknown_mode_is_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(MODE_VARIABLE, "sometimes")
    with track("s", "train", "n", {}, folder=tmp_path) as tracker:
        use(tracker)
    assert warnings(caplog) == [
        'Weights & Biases: mode "sometimes" is unknown (offline, online, disabled); nothing is recorded'
    ]


class FakeRun:
    """A W&B run that fails where it is told to."""

    def __init__(self, fails: str, folder: Path) -> None:
        self.fails, self.codes, self.rows, self.summary = fails, [], [], {}
        (folder / "offline-run-1").mkdir(parents=True)
        (folder / "offline-run-1" / "run-1.wandb").write_text("record")
        self.settings = types.SimpleNamespace(sync_dir=str(folder / "offline-run-1"))

    def define_metric(self, *_args: str, **_options: str) -> None:
        pass

    def log(self, row: dict[str, float]) -> None:
        if self.fails == "log":
            raise ConnectionError(f"key {KEY} at {Path.home()}/x\nrefused")
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self.codes.append(exit_code)
        if self.fails == "finish":
            raise TimeoutError


@pytest.fixture
def fake(monkeypatch):
    """A stand-in for wandb, to see failures that the real one does not give on demand."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    made: list[FakeRun] = []
    module = types.ModuleType("wandb")
    module.fails = ""
    module.Image = lambda path: path
    module.Settings = lambda **settings: types.SimpleNamespace(**settings)

    def init(*, settings: types.SimpleNamespace, **_options: object) -> FakeRun:
        assert "WANDB_API_KEY" not in os.environ
        os.environ["WANDB_SERVICE"] = "made by wandb"
        made.append(FakeRun(module.fails, Path(settings.root_dir) / "wandb"))
        return made[-1]

    module.init = init
    module.teardown = lambda code: None
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module, made


def test_failures_while_running_are_one_warning_without_secrets(tmp_path, fake, caplog):
    module, (made) = fake
    module.fails = "log"
    with track("s", "train", "n", {}, mode="offline", folder=tmp_path) as tracker:
        use(tracker)
        use(tracker)
        assert not tracker.active
    assert warnings(caplog) == ["Weights & Biases: recording stopped (ConnectionError: key ... at .../x refused)"]
    assert made[0].codes == [0]


def test_a_figure_that_is_no_image_is_one_warning(tmp_path, fake, caplog):
    with track("s", "train", "n", {}, mode="offline", folder=tmp_path) as tracker:
        tracker.figure("curve", "figure.txt")
    assert warnings(caplog) == [
        "Weights & Biases: recording stopped (ValueError: figure figure.txt is not one of .png, .jpg, .jpeg)"
    ]


def test_a_run_that_does_not_end_in_time_is_one_warning_and_kept(tmp_path, fake, caplog):
    module, _ = fake
    module.fails = "finish"
    with track("s", "train", "n", {}, mode="offline", folder=tmp_path):
        pass
    assert warnings(caplog) == [
        "Weights & Biases: the run was not uploaded in time (`wandb sync` its folder later) (TimeoutError: no message)"
    ]
    assert [path.name for path in tmp_path.rglob("*.wandb")] == ["run-1.wandb"]


def test_a_record_that_cannot_be_kept_is_one_warning(tmp_path, fake, caplog):
    with track("s", "train", "n", {}, mode="offline", folder=tmp_path / "wandb"):
        (tmp_path / "wandb").rmdir()
        (tmp_path / "wandb").touch()
    (warning,) = warnings(caplog)
    assert warning.startswith("Weights & Biases: the run's record was lost (")


@pytest.mark.parametrize(
    ("ending", "code"),
    [(ValueError("boom"), 1), (SystemExit(143), 143), (SystemExit("text"), 1), (KeyboardInterrupt(), 1)],
)
def test_a_jobs_own_errors_pass_through_and_mark_the_run(tmp_path, fake, ending, code):
    _, made = fake
    with pytest.raises(type(ending)), track("s", "train", "n", {}, mode="offline", folder=tmp_path):
        raise ending
    assert made[0].codes == [code]


def test_the_environment_is_left_as_it_was(tmp_path, fake, monkeypatch):
    monkeypatch.setenv("WANDB_NOTES", "mine")
    before = dict(os.environ)
    with track("s", "train", "n", {}, mode="offline", folder=tmp_path):
        assert dict(os.environ) == before
    assert json.dumps(dict(os.environ)) == json.dumps(before)
