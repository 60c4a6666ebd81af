"""What a step prints, and the status it ends with."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Self

import pytest
from pydantic import model_validator

from jacnorm.errors import UserError
from jacnorm.jacobian.errors import ShapeError
from jacnorm.settings import Count, Settings, setting
from jacnorm.step import run


class Sizes(Settings):
    """Sizes."""

    size: Count = setting(3, "how large", unit="units")
    names: list[str] = setting(["a"], "who")


CALLS = []


def work(settings: Sizes, times: int = 1) -> None:
    """Work."""
    CALLS.append((settings, times))


def rest() -> None:
    """Rest."""
    CALLS.append("rest")


@pytest.fixture(autouse=True)
def calls():
    CALLS.clear()
    return CALLS


@pytest.fixture(autouse=True)
def no_debug(monkeypatch):
    monkeypatch.delenv("JACNORM_DEBUG", raising=False)


def status(*arguments, commands=None) -> int:
    with pytest.raises(SystemExit) as stopped:
        run(commands or {"work": work, "rest": rest}, arguments)
    return stopped.value.code


def failing(error: BaseException):
    def fail() -> None:
        raise error

    return {"fail": fail}


def test_subcommands_and_options(calls):
    run({"work": work, "rest": rest}, ["work", "--size", "5", "--names", "x", "y", "--times", "2"])
    run({"work": work, "rest": rest}, ["rest"])
    run({"work": work}, ["--size", "7"])  # a single one needs no name
    assert calls == [(Sizes(size=5, names=["x", "y"]), 2), "rest", (Sizes(size=7), 1)]


def test_a_user_error_is_one_sentence_and_status_two(capsys):
    assert status(commands=failing(UserError("the file x is missing; make it"))) == 2
    assert capsys.readouterr().err == "ERROR: the file x is missing; make it\n"


def test_the_package_s_own_value_errors_are_mistakes_too(capsys):
    assert status(commands=failing(ShapeError("x has shape (3,); give (B, n)"))) == 2
    assert capsys.readouterr().err == "ERROR: x has shape (3,); give (B, n)\n"


def test_an_impossible_option_is_a_mistake(capsys, calls):
    assert status("work", "--size", "-3") == 2
    error = capsys.readouterr().err
    assert error == 'ERROR: setting "size" is -3, which is not allowed: input should be greater than or equal to 1\n'
    assert calls == []


@pytest.mark.parametrize("arguments", [("work", "--sizes", "3"), ("work", "--size", "large"), ("play",), ()])
def test_wrong_usage_has_status_two_and_no_traceback(capsys, calls, arguments):
    assert status(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out + captured.err
    assert "Traceback" not in captured.out + captured.err
    assert calls == []


def test_help_names_options_units_and_defaults(capsys):
    assert status("work", "--help") == 0
    text = capsys.readouterr().out
    for part in ("--size", "how large", "units", "3"):
        assert part in text


@pytest.mark.parametrize("error", [RuntimeError("odd"), ValueError("odd"), KeyError("odd"), ZeroDivisionError("odd")])
def test_a_bug_keeps_its_traceback_and_has_status_one(capsys, error):
    assert status(commands=failing(error)) == 1
    text = capsys.readouterr().err
    assert text.startswith("Traceback (most recent call last):")
    name = type(error).__name__
    assert text.endswith(f"ERROR: this is a bug in jacnorm ({name}); please report it with the lines above\n")


def test_debugging_keeps_the_traceback_of_a_mistake(capsys, monkeypatch):
    monkeypatch.setenv("JACNORM_DEBUG", "1")
    assert status(commands=failing(UserError("a mistake"))) == 2
    text = capsys.readouterr().err
    assert text.startswith("Traceback (most recent call last):")
    assert text.endswith("\nERROR: a mistake\n")


def test_a_step_that_asks_to_stop_is_let_go(capsys):
    assert status(commands=failing(SystemExit(143))) == 143
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("variable", ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"])
def test_one_thread_unless_said_otherwise(monkeypatch, variable):
    monkeypatch.delenv(variable, raising=False)
    run({"rest": rest}, [])
    assert os.environ[variable] == "1"
    monkeypatch.setenv(variable, "4")
    run({"rest": rest}, [])
    assert os.environ[variable] == "4"


def test_options_that_do_not_fit_together_are_a_mistake(capsys):
    class Pair(Settings):
        low: int = setting(0, "one end")
        high: int = setting(1, "the other end")

        @model_validator(mode="after")
        def _ordered(self) -> Self:
            if self.low > self.high:
                raise ValueError(f"low is {self.low}, above high ({self.high})")
            return self

    def order(settings) -> None:
        CALLS.append(settings)

    order.__annotations__["settings"] = Pair  # a class of this function, which a name could not reach
    assert status("--low", "3", commands={"order": order}) == 2
    assert capsys.readouterr().err == "ERROR: low is 3, above high (1)\n"


def test_a_real_step_from_the_shell():
    command = [sys.executable, "-m", "jacnorm.studies.stability.judge"]
    asked = subprocess.run([*command, "--help"], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert asked.returncode == 0
    assert "usage: python -m jacnorm.studies.stability.judge" in asked.stdout
    options = ["--scale", "smoke", "--settings", '{"dpth": {}}', "--tables", "t", "--data", "d"]
    wrong = subprocess.run(
        [*command, *options, "--verdicts", "v", "--manifest", "m"], capture_output=True, text=True, env={**os.environ}
    )
    assert wrong.returncode == 2
    assert wrong.stderr.startswith(
        'ERROR: configuration key "studies.stability.dpth" is unknown; did you mean "depth"?'
    )
    assert len(wrong.stderr.splitlines()) == 1


@pytest.mark.parametrize("words", [[], ["work"]])
def test_the_only_command_may_be_named_or_not(words):
    run({"work": work}, [*words, "--size", "4"])
    (called,) = CALLS
    assert called == (Sizes(size=4), 1)
