"""Sources and targets in one scaling."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from jacnorm.data.prepare import prepare
from jacnorm.data.read import Prepared, Split, read, standardise
from jacnorm.errors import UserError
from jacnorm.studies.fedgtst import inputs as module
from jacnorm.studies.fedgtst.inputs import load
from jacnorm.studies.fedgtst.settings import DOMAINS, DomainSettings, EnginesSettings, FederatedSettings


@pytest.fixture(scope="module")
def files(digits, tmp_path_factory):
    target = tmp_path_factory.mktemp("data") / "digits_m.safetensors"
    prepare("digits_m", target)
    return [target, digits]  # their order does not matter


def made(name: str, number: int = 0, size: int = 12, channels: int = 3) -> Prepared:
    """A data set of invented pixels."""
    draw = torch.Generator().manual_seed(number)
    parts = [
        Split(
            torch.randint(0, 200, (rows, channels, 4, 4), generator=draw, dtype=torch.uint8),
            torch.randint(0, 3, (rows,), generator=draw),
        )
        for rows in (size, size // 2)
    ]
    return Prepared(name, name, *parts, ("a", "b", "c"), 255, "", "digest", "", "", "")


@pytest.fixture
def given(monkeypatch):
    """Let data sets take the place of files."""
    monkeypatch.setattr(module, "read", lambda data: data)


def sentence(settings, paths) -> str:
    with pytest.raises(UserError) as caught:
        load(settings, paths)
    return str(caught.value)


def test_digits_are_grey_and_have_the_moments_of_a_standard_source(files):
    (inputs,) = load(FederatedSettings(), files)
    stored = read(files[1])
    assert (inputs.source, inputs.target, inputs.classes, inputs.shape) == ("digits", "digits_m", 10, (3, 8, 8))
    assert inputs.source_train.x.shape == (1437, 3, 8, 8)
    assert inputs.source_train.x.dtype == torch.float32
    # The scaling that other studies use is another route to the same numbers.
    train, test = standardise(stored.train.x, stored.test.x, over="pixels")
    for channel in range(3):
        torch.testing.assert_close(inputs.source_train.x[:, channel], train[:, 0], atol=1e-6, rtol=0)
        torch.testing.assert_close(inputs.source_test.x[:, channel], test[:, 0], atol=1e-6, rtol=0)
    assert torch.equal(inputs.source_train.y, stored.train.y)
    assert torch.equal(inputs.source_test.y, stored.test.y)
    assert inputs.domains.unique().tolist() == [0]


def test_the_target_is_scaled_as_the_source(files):
    """White is 255 in the target and 16 in the source, and must become one number."""
    (inputs,) = load(FederatedSettings(), files)
    source, target = read(files[1]), read(files[0])
    white = inputs.source_train.x[:, 0][source.train.x[:, 0] == 16]
    seen = inputs.target_test.x[target.test.x == 255]
    assert len(seen) > 0
    torch.testing.assert_close(seen.unique(), white.unique(), atol=1e-6, rtol=0)
    black = inputs.source_train.x.min()
    torch.testing.assert_close(inputs.target_test.x[target.test.x == 0].unique(), black[None], atol=1e-6, rtol=0)


def test_target_samples_are_divided_once_and_for_all(files):
    stored = read(files[0])
    (inputs,) = load(FederatedSettings(), files)
    assert (len(inputs.target_train), len(inputs.target_validation), len(inputs.target_test)) == (1150, 287, 360)
    whole = torch.cat([*inputs.target_train.images, *inputs.target_validation.images])
    assert sorted(map(bytes, whole.numpy())) == sorted(map(bytes, stored.train.x.numpy()))
    (again,) = load(FederatedSettings(seeds=[77], methods=["fedavg"]), files)
    assert torch.equal(again.target_validation.x, inputs.target_validation.x)
    (small,) = load(FederatedSettings(target_samples=100, validation_share=0.3), files)
    assert (len(small.target_train), len(small.target_validation), len(small.target_test)) == (70, 30, 360)


def test_engines_have_a_source_only(files):
    (inputs,) = load(EnginesSettings(), files)
    (pair,) = load(FederatedSettings(), files)
    assert (inputs.source, inputs.target) == ("digits", "")
    assert torch.equal(inputs.source_train.x, pair.source_train.x)
    assert len(inputs.target_train) == len(inputs.target_validation) == len(inputs.target_test) == 0
    assert inputs.target_test.x.shape == (0, 3, 8, 8)


def test_taking_rows_is_taking_them_from_all(given):
    """Two parts of one set, rows in any order and arrangement, some twice."""
    domains = [made(f"domainnet_{domain}", number, 9 + number) for number, domain in enumerate(DOMAINS)]
    train = load(DomainSettings(), domains)[0].source_train
    rows = torch.randint(0, len(train), (4, 7), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(train.take(rows), train.x[rows], atol=0, rtol=0)
    assert train.take(rows).shape == (4, 7, 3, 4, 4)
    assert train.take(rows[:, :0]).shape == (4, 0, 3, 4, 4)


def test_each_domain_is_the_target_of_the_others(given):
    domains = [made(f"domainnet_{domain}", number, 9 + number) for number, domain in enumerate(DOMAINS)]
    found = load(DomainSettings(), domains[::-1])
    assert [inputs.target for inputs in found] == [data.name for data in domains]
    assert {inputs.source for inputs in found} == {"domainnet"}
    for number, inputs in enumerate(found):
        sources = [data for data in domains if data.name != inputs.target]
        whole = torch.cat([data.train.x for data in sources])
        expected = standardise(whole, domains[number].test.x, over="pixels")
        torch.testing.assert_close(inputs.source_train.x, expected[0], atol=2e-6, rtol=0)
        torch.testing.assert_close(inputs.target_test.x, expected[1], atol=2e-6, rtol=0)
        assert inputs.domains.bincount().tolist() == [len(data.train) for data in sources]
        assert torch.equal(inputs.source_train.y, torch.cat([data.train.y for data in sources]))
        assert torch.equal(inputs.source_test.y, torch.cat([data.test.y for data in sources]))
    assert [len(inputs.target_train) + len(inputs.target_validation) for inputs in found] == list(range(9, 15))


def test_a_channel_without_variation_becomes_zero(given):
    source = made("digits")
    source.train.x[:, 1] = 77
    (inputs,) = load(FederatedSettings(), [source, made("digits_m", 1)])
    assert (inputs.source_train.x[:, 1] == 0).all()
    assert (inputs.target_train.x[:, 1] == 0).all()
    assert inputs.target_train.x.isfinite().all()
    torch.testing.assert_close(inputs.source_train.x.std((0, 2, 3), correction=0), torch.tensor([1.0, 0.0, 1.0]))


def test_mistakes(given):
    source, target = made("digits"), made("digits_m", 1)
    assert sentence(FederatedSettings(), [source]) == (
        "the settings name the data set digits_m, but the files given hold digits; prepare it with "
        "jacnorm.data.prepare and pass its file too"
    )
    assert "but the files given hold nothing;" in sentence(EnginesSettings(), [])
    wide = replace(target, train=Split(target.train.x[..., :3], target.train.y))
    assert sentence(FederatedSettings(), [source, wide]) == (
        "digits_m has 3 classes and images of 4 x 3 pixels, but digits has 3 classes and images of 4 x 4 pixels; "
        "prepare both with the same release of jacnorm"
    )
    assert "has 2 classes" in sentence(FederatedSettings(), [source, replace(target, classes=("a", "b"))])
    assert sentence(FederatedSettings(target_samples=13), [source, target]) == (
        "target_samples is 13, but digits_m has 12 training samples; choose at most that many"
    )
    assert sentence(FederatedSettings(validation_share=0.01), [source, target]) == (
        "validation_share is 0.01: a fraction 0.01 of 12 rows leaves an empty part; choose one that gives 1 to 11 rows"
    )
