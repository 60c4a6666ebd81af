"""What a plan says that the study keeps is what its training step writes."""

from __future__ import annotations

import pytest
from tests.studies.attention.tiny_models import gpt2, made, saved

from jacnorm.data.prepare import prepare
from jacnorm.files import load_tensors
from jacnorm.studies.attention import storage
from jacnorm.studies.attention.settings import ProbingSettings, StudySettings
from jacnorm.studies.attention.train_language import probing

SMALL = {"layers": 2, "heads": 2, "width": 8, "context": 16, "vocabulary": 300, "lengths": [8, 16], "steps": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "python_docs.safetensors"
    prepare("python_docs", path)
    return path


@pytest.mark.parametrize("given", [False, True])
def test_storage_is_what_training_keeps(text, tmp_path, monkeypatch, given):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")
    settings = ProbingSettings(seeds=[10, 11], windows=2, **SMALL)
    if given:
        settings = settings.model_copy(update={"model": str(saved(tmp_path / "model", made(gpt2)))})
    weights = tmp_path / "weights.safetensors"
    probing(settings, tmp_path, [text], weights, "cpu")
    tensors, _ = load_tensors(weights)
    kept = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert storage.kept_bytes(StudySettings(probing=settings)) == kept


def test_rows_with_known_geometry_keep_nothing():
    assert storage.kept_bytes(StudySettings(), ["synthetic"]) == 0
