"""Configurations: a scale with the user's keys on top, and the sentence that each mistake gets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jacnorm.config import Machine, data_sets, load, reference, study_names, study_settings
from jacnorm.errors import UserError
from jacnorm.studies.stability.settings import StudySettings

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def folder(tmp_path):
    """A folder of scales: smoke as it is, and a large one."""
    (tmp_path / "smoke.yaml").write_text("")
    (tmp_path / "large.yaml").write_text(
        """
        scale: large
        jobs: {train: {gpu: 1, mem_mb: 9000}}
        studies: {stability: {depth: {widths: [64, 128], depth: 80}, drift: {epochs: 17}}}
        """
    )
    return tmp_path


def test_smoke_is_the_defaults():
    found = load(CONFIGS)
    assert found.machine.model_copy(update={"studies": {}}) == Machine()
    assert found.studies == {study: study_settings(study)() for study in study_names()}
    assert found.studies["stability"] == StudySettings()


def test_the_file_of_smoke_is_generated_and_names_every_key():
    text = (CONFIGS / "smoke.yaml").read_text()
    assert text == reference()
    content = yaml.safe_load(text)
    assert content["studies"] == {study: study_settings(study)().model_dump() for study in study_names()}
    assert {**content, "studies": {}} == Machine().model_dump()


@pytest.mark.parametrize("scale", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_scale_is_valid_and_says_its_name(scale):
    assert load(CONFIGS, {"scale": scale}).machine.scale == scale


def test_judged_seeds_are_not_those_of_pilots():
    for scale in ("smoke", "laptop", "paper"):
        study = load(CONFIGS, {"scale": scale}).studies["stability"]
        for experiment in type(study).model_fields:
            assert min(getattr(study, experiment).seeds) >= 10


def test_the_overlay_merges_mappings_and_replaces_the_rest(folder):
    mine = {"scale": "large", "jobs": {"train": {"mem_mb": 10}}, "studies": {"stability": {"depth": {"widths": [8]}}}}
    found = load(folder, mine)
    assert found.machine.jobs.train.model_dump() == {"mem_mb": 10, "gpu": 1, "runtime": 30}
    study = found.studies["stability"]
    assert (study.depth.widths, study.depth.depth, study.drift.epochs) == ([8], 80, 17)
    assert study.theorem == StudySettings().theorem
    assert mine["jobs"] == {"train": {"mem_mb": 10}}  # the caller's mapping is left alone


@pytest.mark.parametrize(
    "mine",
    [
        {"studies": None},
        {"studies": {"stability": None}},
        {"studies": {"stability": {"depth": None}}},
        {"jobs": None},
    ],
)
def test_a_heading_whose_keys_are_commented_out_changes_nothing(folder, mine):
    assert load(folder, {"scale": "large", **mine}) == load(folder, {"scale": "large"})


def test_no_value_is_still_a_value(folder):
    (folder / "large.yaml").write_text(
        "scale: large\nmirror: somewhere\nstudies: {stability: {drift: {train_samples: 5}}}"
    )
    found = load(
        folder, {"scale": "large", "mirror": None, "studies": {"stability": {"drift": {"train_samples": None}}}}
    )
    assert found.machine.mirror is None
    assert found.studies["stability"].drift.train_samples is None


def test_numbers_that_arrive_as_text(folder):
    drift = {"learning_rate": "1e-3", "epochs": "3", "momentum": "0.5", "measured_epochs": ["0", "3"], "seeds": [10]}
    found = load(folder, {"studies": {"stability": {"drift": drift}}}).studies["stability"].drift
    assert (found.learning_rate, found.epochs, found.momentum, found.measured_epochs) == (0.001, 3, 0.5, [0, 3])
    assert isinstance(found.epochs, int)


def test_text_stays_text_where_text_is_meant(folder):
    found = load(folder, {"results": "2024", "mirror": "off"}).machine
    assert (found.results, found.mirror) == ("2024", "off")


def test_only_selects_studies(folder):
    assert load(folder).selected == study_names()
    assert load(folder, {"only": ["stability"]}).selected == ["stability"]
    assert load(folder, {"only": []}).selected == []


def test_data_sets_are_those_that_selected_studies_name_and_read(folder):
    mine = {
        "only": ["stability", "lipschitz"],
        "studies": {
            "stability": {"scores": {"data_set": "mnist"}, "drift": {"data_sets": ["mnist", "digits"]}},
            "lipschitz": {"table": {"seeds": [], "data_set": "cifar10"}},
        },
    }
    found = load(folder, mine)
    assert data_sets(found.studies["stability"].depth) == []
    assert data_sets(found.studies["stability"].scores) == ["mnist"]
    assert data_sets(found.studies["stability"].drift) == ["mnist", "digits"]
    assert found.data_sets == {"digits", "mnist"}
    assert load(folder, mine | {"only": ["lipschitz"]}).data_sets == {"digits"}
    assert load(folder, {"only": []}).data_sets == set()


def mistake(folder: Path, overlay: dict) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, overlay)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def in_study(**experiments):
    return {"studies": {"stability": experiments}}


@pytest.mark.parametrize(
    ("overlay", "parts"),
    [
        ({"scale": "huge"}, ['"scale" is "huge"', "choose one of large, smoke"]),
        ({"scal": "smoke"}, ['"scal" is unknown; did you mean "scale"?', "allowed here: scale, "]),
        ({"results": ""}, ["\"results\" is ''", "at least 1 character"]),
        ({"device": "gpu"}, ["\"device\" is 'gpu'", "'auto', 'cpu' or 'cuda'"]),
        ({"wandb": True}, ['"wandb" is True', "'offline', 'online' or 'disabled'"]),
        ({"jobs": 5}, ['"jobs" is 5', "mapping"]),
        ({"jobs": {"trian": {}}}, ['"jobs.trian" is unknown; did you mean "train"?', "allowed here: data, train, "]),
        ({"jobs": {"train": {"gpus": 1}}}, ['"jobs.train.gpus" is unknown; did you mean "gpu"?']),
        ({"jobs": {"train": {"mem_mb": 0}}}, ['"jobs.train.mem_mb" is 0', "greater than or equal to 1"]),
        ({"jobs": {"train": {"gpu": -1}}}, ['"jobs.train.gpu" is -1', "greater than or equal to 0"]),
        ({"studies": 5}, ['"studies" is 5', "mapping"]),
        ({"studies": {"stabilty": {}}}, ['"studies.stabilty" is unknown; did you mean "stability"?']),
        ({"studies": {"stability": [1]}}, ['"studies.stability" is [1]', "mapping"]),
        ({"only": ["stabilty"]}, ['"only" names the unknown study "stabilty"; did you mean "stability"?']),
        ({"only": "stability"}, ["\"only\" is 'stability'", "valid list"]),
        (in_study(depht={}), ['"studies.stability.depht" is unknown; did you mean "depth"?', "theorem"]),
        (in_study(depth={"widht": [1]}), ['"studies.stability.depth.widht" is unknown', "widths"]),
        (in_study(depth=3), ['"studies.stability.depth" is 3', "mapping"]),
        (in_study(depth={"widths": [64, -1]}), ['"studies.stability.depth.widths.1" is -1', "equal to 1"]),
        (in_study(depth={"widths": []}), ['"studies.stability.depth.widths" is []', "at least 1 item"]),
        (in_study(depth={"widths": 64}), ['"studies.stability.depth.widths" is 64', "valid list"]),
        (in_study(depth={"widths": [64, 64]}), ['"studies.stability.depth.widths" is [64, 64]', "must be distinct"]),
        (in_study(depth={"depth": 2.5}), ['"studies.stability.depth.depth" is 2.5', "valid integer"]),
        (in_study(depth={"depth": True}), ['"studies.stability.depth.depth" is True', "valid integer"]),
        (in_study(depth={"seeds": []}), ['"studies.stability.depth.seeds" is []', "at least 1 item"]),
        (in_study(depth={"seeds": [-1]}), ['"studies.stability.depth.seeds.0" is -1', "equal to 0"]),
        (in_study(depth={"seeds_per_job": 0}), ['"studies.stability.depth.seeds_per_job" is 0', "equal to 1"]),
        (in_study(depth={"sparsities": [1.0]}), ['"studies.stability.depth.sparsities.0" is 1.0', "less than 1"]),
        (in_study(scores={"methods": ["snap"]}), ["\"studies.stability.scores.methods.0\" is 'snap'", "'synflow'"]),
        (in_study(drift={"learning_rate": float("nan")}), ['"studies.stability.drift.learning_rate" is nan', "finite"]),
        (in_study(drift={"epochs": 4}), ['"studies.stability.drift": measured_epochs has 10', "ends after 4 epochs"]),
        (in_study(drift={"train_samples": "all"}), ["\"studies.stability.drift.train_samples\" is 'all'", "integer"]),
    ],
)
def test_each_mistake_names_the_key_and_what_is_allowed(folder, overlay, parts):
    sentence = mistake(folder, overlay)
    assert sentence.startswith("configuration key ")
    for part in parts:
        assert part in sentence


def test_a_mapping_of_the_scale_is_not_replaced_by_something_else(folder):
    sentence = mistake(folder, {"scale": "large", "jobs": 5})
    assert sentence == 'configuration key "jobs" is 5; it must be a mapping with keys such as train'
    assert '"studies.stability.depth" is 5' in mistake(folder, {"scale": "large", **in_study(depth=5)})


def test_several_mistakes_are_all_named(folder):
    sentence = mistake(folder, in_study(depth={"depth": 0, "sparsities": [2.0]}))
    assert '"studies.stability.depth.depth" is 0' in sentence
    assert '"studies.stability.depth.sparsities.0" is 2.0' in sentence


@pytest.mark.parametrize(
    ("text", "part"), [("a: [1", "is not valid YAML"), ("- 1", "holds a list; it must be a mapping")]
)
def test_a_scale_that_cannot_be_read_is_named(folder, text, part):
    (folder / "smoke.yaml").write_text(text)
    sentence = mistake(folder, {})
    assert str(folder / "smoke.yaml") in sentence
    assert part in sentence


def test_the_module_prints_the_file_of_smoke():
    printed = subprocess.run(
        [sys.executable, "-m", "jacnorm.config"], capture_output=True, text=True, check=True
    ).stdout
    assert printed == (CONFIGS / "smoke.yaml").read_text()


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("studies: {stability: {depth: {widths: [32]}}}", 0, ""),
        (
            "studies: {stability: {depth: {widths: [0]}}}",
            2,
            'ERROR: configuration key "studies.stability.depth.widths.0"',
        ),
        ("studies: {stability: {}}\nstudies: {}", 2, "is not valid YAML: key 'studies' is given 2 times"),
        ("- 1", 2, "holds a list; it must be a mapping"),
    ],
)
def test_a_file_of_the_user_is_checked_from_the_command_line(text, code, said, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    command = [sys.executable, "-m", "jacnorm.config", "--file", str(tmp_path / "mine.yaml"), "--scale", "laptop"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == (code != 0)


def test_the_command_line_tells_the_folder_of_a_scale(tmp_path):
    (tmp_path / "mine.yaml").write_text("results: elsewhere\n")
    command = [
        sys.executable,
        "-m",
        "jacnorm.config",
        "--folder",
        "--scale",
        "paper",
        "--file",
        str(tmp_path / "mine.yaml"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert done.stdout == "elsewhere/paper\n"
