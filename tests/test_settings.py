"""Settings: blocks of seeds, command-line options that say the same, and mistakes in words."""

from __future__ import annotations

import functools
import shlex
import types
import typing
from typing import Self

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError, model_validator
from pydantic.fields import FieldInfo

from jacnorm.errors import UserError
from jacnorm.settings import Count, SeededSettings, Settings, flags, setting, suggestion, table
from jacnorm.step import run
from jacnorm.studies.stability import measure, train
from jacnorm.studies.stability.settings import DriftSettings, StudySettings

# --- any valid settings ----------------------------------------------------------------------------------------------


def values(annotation, limits=()) -> st.SearchStrategy:
    """Any value that an annotation with these limits allows; written apart from pydantic, from the limits alone."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        inner = [limit for extra in arguments[1:] for limit in (extra.metadata if isinstance(extra, FieldInfo) else [])]
        return values(arguments[0], [*limits, *inner])
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(values(each, limits) for each in arguments))
    if annotation is type(None):
        return st.none()
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is list:
        return st.lists(values(arguments[0]), min_size=1, max_size=3, unique=True)
    bounds = {type(limit).__name__: vars_of(limit) for limit in limits}
    if annotation is int:
        return st.integers(bounds.get("Ge", 0), 10**9)
    assert annotation is float, annotation
    return st.floats(
        bounds.get("Ge", bounds.get("Gt")),
        bounds.get("Lt", 1e300),
        exclude_min="Gt" in bounds,
        exclude_max="Lt" in bounds,
        allow_nan=False,
    )


def vars_of(limit) -> float | None:
    return next((getattr(limit, name) for name in ("ge", "gt", "le", "lt") if hasattr(limit, name)), None)


FRACTIONS = st.floats(0, 1, exclude_min=True)
# Fields that must fit others of their experiment: degrees the sizes, measured epochs the length of the training.
FITTING = {
    "sizes": st.lists(st.integers(2, 10**9), min_size=1, max_size=3, unique=True),
    "degrees_over_log": st.lists(FRACTIONS, min_size=1, max_size=3, unique=True),
    "network_degrees": st.lists(FRACTIONS, min_size=1, max_size=3, unique=True),
    "fixed_degree": FRACTIONS,
    "epochs": st.integers(5, 10**9),
    "measured_epochs": st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True),
}


def any_settings(kind: type[Settings]) -> st.SearchStrategy[Settings]:
    """Any valid settings of a class."""
    strategies = {name: values(field.annotation, field.metadata) for name, field in kind.model_fields.items()}
    return st.builds(kind, **strategies | {name: FITTING[name] for name in FITTING.keys() & strategies.keys()})


# --- the command line ------------------------------------------------------------------------------------------------

STEPS = {(step.__name__.rpartition(".")[2], name): getattr(step, name) for step, names in {
    train: ("trainability", "drift"), measure: tuple(StudySettings.model_fields)
}.items() for name in names}  # fmt: skip
OTHER = {"tables": "t", "data": "d", "weights": "w"}


@pytest.mark.parametrize("step", STEPS, ids=" ".join)
def test_options_on_the_command_line_build_the_same_settings(step):
    function = STEPS[step]
    kind = StudySettings.model_fields[step[1]].annotation
    hints = typing.get_type_hints(function)
    assert hints["settings"] is kind
    files = [word for name in OTHER.keys() & hints.keys() for word in (f"--{name}", OTHER[name])]
    received = []

    @functools.wraps(function)
    def stub(settings, **options):
        received.append(settings)

    @hypothesis_settings(deadline=None, max_examples=50)
    @given(any_settings(kind))
    def check(settings):
        received.clear()
        text = flags(settings)
        run({step[1]: stub, "other": lambda: None}, [step[1], *files, *shlex.split(text)])
        assert received == [settings.model_copy(update={"seeds_per_job": kind().seeds_per_job})]
        assert flags(received[0]) == text

    check()


def test_options_are_canonical_and_leave_out_how_jobs_are_grouped():
    assert flags(DriftSettings(seeds_per_job=3)) == flags(DriftSettings())
    text = flags(DriftSettings(seeds=[11, 10], train_samples=None, learning_rate=1e-5))
    assert text.startswith("--seeds 11 10 --data-sets digits --train-samples None --width 128 ")
    assert text.endswith(" --learning-rate 1e-05 --measured-epochs 0 1 2 5 10")


def test_options_are_quoted_for_the_shell():
    class Named(Settings):
        name: str = setting("a b; c", "a name")

    assert shlex.split(flags(Named())) == ["--name", "a b; c"]


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("default", [True, False])
def test_switches_are_said_in_either_case(value, default):
    class Switched(Settings):
        both_ways: bool = setting(default, "a switch")

    received = []

    def command(settings) -> None:
        received.append(settings)

    command.__annotations__["settings"] = Switched

    run({"command": command, "other": lambda: None}, ["command", *shlex.split(flags(Switched(both_ways=value)))])
    assert received == [Switched(both_ways=value)]


# --- blocks of seeds -------------------------------------------------------------------------------------------------

SEEDS = st.lists(st.integers(0, 200), min_size=1, max_size=30, unique=True)
SIZES = st.integers(1, 40)


@hypothesis_settings(deadline=None)
@given(SEEDS, SIZES)
def test_blocks_share_out_the_seeds(seeds, size):
    settings = SeededSettings(seeds=seeds, seeds_per_job=size)
    blocks = settings.blocks()
    assert [seed for block in blocks for seed in block] == sorted(seeds)
    assert all(len(block) <= size and block[-1] - block[0] < size for block in blocks)
    names = settings.block_names()
    assert len(set(names)) == len(blocks)
    for name, block in zip(names, blocks, strict=True):
        assert settings.block(name) == SeededSettings(seeds=block, seeds_per_job=size)


@hypothesis_settings(deadline=None)
@given(SEEDS, SEEDS, SIZES)
def test_new_seeds_leave_other_blocks_alone(seeds, new, size):
    before = SeededSettings(seeds=seeds, seeds_per_job=size)
    after = SeededSettings(seeds=sorted({*seeds, *new}), seeds_per_job=size)
    touched = {seed // size for seed in set(new) - set(seeds)}
    for block, name in zip(before.blocks(), before.block_names(), strict=True):
        if block[0] // size not in touched:
            assert flags(after.block(name)) == flags(before.block(name))
        else:
            assert block not in after.blocks()


def test_a_full_block_is_named_after_its_ends_and_an_unknown_one_is_refused():
    settings = SeededSettings(seeds=list(range(10, 25)), seeds_per_job=10)
    assert settings.block_names() == ["s10-19", "s20-24"]
    with pytest.raises(KeyError, match=r"no block s20-29; there are \['s10-19', 's20-24'\]"):
        settings.block("s20-29")


# --- mistakes --------------------------------------------------------------------------------------------------------


class Inner(Settings):
    size: Count = setting(3, "how large", unit="units")


class Outer(Settings):
    inner: Inner = setting(Inner(), "a part")
    rate: float = setting(0.5, "how fast", gt=0)
    names: list[str] = setting(["a", "b"], "who")


class Pair(Settings):
    low: int = setting(0, "one end")
    high: int = setting(1, "the other end")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low is {self.low}, above high ({self.high})")
        return self


class Pairs(Settings):
    first: Pair = setting(Pair(), "a pair")


class Needy(Settings):
    name: str = setting(..., "must be given")


ALLOWED = ", which is not allowed: "
LOW, MAPPING = "input should be greater than or equal to 1", "it must be a mapping of keys to values"


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Inner(size=0), f'setting "size" is 0{ALLOWED}{LOW}'),
        (lambda: Inner(size="3"), f"setting \"size\" is '3'{ALLOWED}input should be a valid integer"),
        (lambda: Inner(sizes=1), 'setting "sizes" is unknown; did you mean "size"? allowed here: size'),
        (lambda: Needy(), 'setting "name" is missing; add it'),
        (lambda: Pair(low=3), "low is 3, above high (1)"),
        (lambda: SeededSettings(seeds=[1, 1]), f'setting "seeds" is [1, 1]{ALLOWED}values must be distinct'),
    ],
)
def test_a_mistake_is_a_sentence(make, sentence):
    with pytest.raises(UserError) as caught:
        make()
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("kind", "content", "path", "rest"),
    [
        (Outer, {"inner": {"siz": 1}}, "a.b", 'a.b.inner.siz" is unknown; did you mean "size"? allowed here: size'),
        (Outer, {"inner": {"size": 0}}, "", f'inner.size" is 0{ALLOWED}{LOW}'),
        (Outer, {"inner": 3}, "a", f'a.inner" is 3{ALLOWED}{MAPPING}'),
        (Outer, 3, "a", f'a" is 3{ALLOWED}{MAPPING}'),
        (Outer, {"rate": float("inf")}, "a", f'a.rate" is inf{ALLOWED}input should be a finite number'),
        (Needy, {}, "a", 'a.name" is missing; add it'),
        (Pair, {"low": 3}, "a", 'a": low is 3, above high (1)'),
        (Pairs, {"first": {"low": 3}}, "a", 'a.first": low is 3, above high (1)'),
    ],
)
def test_a_mistake_in_a_configuration_names_the_full_path(kind, content, path, rest):
    with pytest.raises(UserError) as caught:
        kind.validate(content, path)
    assert str(caught.value) == f'configuration key "{rest}'


def test_settings_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        Inner().size = 4


def test_an_integer_is_taken_for_a_float_but_not_the_reverse():
    assert Outer(rate=1).rate == 1.0
    with pytest.raises(UserError, match="valid integer"):
        Inner(size=1.0)


def test_a_suggestion_is_made_only_when_something_is_near():
    assert suggestion("zzz", ["width", "depth"]) == "allowed here: width, depth"
    assert suggestion("widht", ["width", "depth"]) == 'did you mean "width"? allowed here: width, depth'


# --- the settings table ----------------------------------------------------------------------------------------------


def test_the_table_flattens_and_explains():
    assert list(table(Outer(), "study.")) == [
        {"key": "study.inner.size", "value": "3", "unit": "units", "description": "how large"},
        {"key": "study.rate", "value": "0.5", "unit": "", "description": "how fast"},
        {"key": "study.names", "value": "a, b", "unit": "", "description": "who"},
    ]


def test_every_setting_of_the_study_says_what_it_means():
    rows = list(table(StudySettings()))
    assert len(rows) > 50
    assert all(row["description"] for row in rows)


# --- what may be shown -----------------------------------------------------------------------------------------------


class Probe(Settings):
    model: str | None = setting(None, "what to probe", private=True)
    note: str = setting("/as/it/is", "not private")


class Probes(Settings):
    probe: Probe = setting(Probe(), "a part")
    sizes: list[int] = setting([1, 2], "sizes")


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        (None, None),
        ("owner/model", "owner/model"),
        ("there/model", "model"),
        ("there/model/", "model"),
        ("there", "there"),
        ("./there/model", "model"),
        ("../someone/model", "model"),
        ("/home/someone/model", "model"),
        ("/home/someone/model/", "model"),
        ("~/model", "model"),
        ("~someone/model", "model"),
    ],
)
def test_of_a_private_path_only_the_last_part_is_shown(tmp_path, monkeypatch, model, shown):
    (tmp_path / "there" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    settings = Probes(probe=Probe(model=model))
    assert settings.public() == {"probe": {"model": shown, "note": "/as/it/is"}, "sizes": [1, 2]}
    assert [row["value"] for row in table(settings)] == [str(shown), "/as/it/is", "1, 2"]
    assert Probes.model_validate(settings.public()).public() == settings.public()
    assert settings.probe.model == model  # the step still finds it


def test_settings_without_private_values_are_shown_as_they_are():
    assert StudySettings().public() == StudySettings().model_dump()
