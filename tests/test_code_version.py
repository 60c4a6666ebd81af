"""The digest of a step's code, on a small package made for each test."""

from __future__ import annotations

import pytest

from jacnorm import code_version as module
from jacnorm.code_version import closure, code_version


class Package:
    """Modules of a package called jacnorm, by name without that prefix; packages end with a dot."""

    def __init__(self, root):
        self.root = root
        self.write("", "")

    def write(self, name: str, text: str) -> None:
        parts = name.split(".")
        path = self.root.joinpath(*parts[:-1], f"{parts[-1] or '__init__'}.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for cached in (module._imports, module._tree, module._canonical):
            cached.cache_clear()


@pytest.fixture
def package(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROOT", tmp_path)
    yield Package(tmp_path)
    for cached in (module._imports, module._tree, module._canonical):
        cached.cache_clear()


def names(start: str) -> set[str]:
    """The closure, without the prefix."""
    return {name.removeprefix("jacnorm").removeprefix(".") for name in closure(f"jacnorm.{start}")}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import jacnorm.nets.mlp", {"nets", "nets.mlp"}),
        ("import jacnorm.nets.mlp as m, os", {"nets", "nets.mlp"}),
        ("from jacnorm.nets import mlp", {"nets", "nets.mlp"}),
        ("from jacnorm.nets.mlp import forward", {"nets", "nets.mlp"}),
        ("from jacnorm import nets", {"nets"}),
        ("from jacnorm.nets import *", {"nets"}),
        ("from . import other", {"steps.other"}),
        ("from .other import thing", {"steps.other"}),
        ("from ..nets.mlp import forward", {"nets", "nets.mlp"}),
        ("from .. import nets", {"nets"}),
        ("def f():\n    from jacnorm.nets import mlp\n", {"nets", "nets.mlp"}),
        ("try:\n    import jacnorm.nets\nexcept ImportError:\n    pass\n", {"nets"}),
        ("from jacnorm.nets.mlp import Layer\n\nclass Mine(Layer):\n    pass\n", {"nets", "nets.mlp"}),
        ("import torch, jacnormal", set()),
        ("x = 'import jacnorm.nets'", set()),
    ],
)
def test_every_way_to_import_is_followed(package, text, found):
    package.write("nets.", "")
    package.write("nets.mlp", "forward = Layer = 1")
    package.write("steps.", "")
    package.write("steps.other", "thing = 1")
    package.write("steps.step", text)
    assert names("steps.step") == {"", "steps", "steps.step"} | found


def test_imports_are_followed_transitively_and_in_circles(package):
    package.write("a", "from jacnorm import b")
    package.write("b", "from jacnorm import c")
    package.write("c", "def later():\n    from jacnorm import a\n")
    package.write("d", "")
    assert names("a") == names("b") == names("c") == {"", "a", "b", "c"}
    assert names("d") == {"", "d"}


def test_a_package_means_its_init_and_what_that_imports(package):
    package.write("core.", "from jacnorm.core.parts import part")
    package.write("core.parts", "from . import deep")
    package.write("core.deep", "")
    package.write("core.unused", "")
    package.write("step", "from jacnorm.core import part")
    assert names("step") == {"", "step", "core", "core.parts", "core.deep"}
    assert names("core") == {"", "core", "core.parts", "core.deep"}


@pytest.mark.parametrize("test", ["TYPE_CHECKING", "typing.TYPE_CHECKING"])
def test_what_only_type_checkers_read_does_not_count(package, test):
    package.write("types", "")
    package.write("real", "")
    package.write("step", f"if {test}:\n    from jacnorm import types\nelse:\n    from jacnorm import real\nx = 1\n")
    before = code_version("jacnorm.step")
    assert names("step") == {"", "step", "real"}
    package.write("types", "y = 2")
    assert code_version("jacnorm.step") == before
    package.write("real", "y = 2")
    assert code_version("jacnorm.step") != before


STEP = '''"""A step."""

import math


class Thing:
    """A thing."""

    size = 3


def area(radius, *, half=False):
    """Area of a disc."""
    return math.pi * radius**2 / (2 if half else 1)
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""A step."""', '"""The same step, said otherwise."""'),
        ('"""A step."""\n\n', ""),
        ('    """Area of a disc."""\n', ""),
        ('"""A thing."""', "'a thing'"),
        ("    size = 3", "    # units\n    size = 3  # wide"),
        (
            "math.pi * radius**2 / (2 if half else 1)",
            "(\n        math.pi * radius ** 2\n        / (2 if half else 1)\n    )",
        ),
        ("import math\n\n\n", "import math\n"),
    ],
)
def test_comments_docstrings_and_layout_do_not_count(package, old, new):
    package.write("step", STEP)
    before = code_version("jacnorm.step")
    assert STEP.count(old) == 1
    package.write("step", STEP.replace(old, new))
    assert code_version("jacnorm.step") == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("size = 3", "size = 4"),
        ("half=False", "half=True"),
        ("radius**2 / (2", "radius**(2 / 2"),
        ("area(", "surface("),
        ("import math", "import cmath as math"),
        ("    return", '    "not the docstring: the second string"\n    return'),
    ],
)
def test_what_executes_counts(package, old, new):
    package.write("step", STEP)
    before = code_version("jacnorm.step")
    assert old in STEP
    package.write("step", STEP.replace(old, new))
    assert code_version("jacnorm.step") != before


def test_where_a_statement_stands_counts(package):
    package.write("step", "if x:\n    a()\n    b()\n")
    before = code_version("jacnorm.step")
    package.write("step", "if x:\n    a()\nb()\n")
    assert code_version("jacnorm.step") != before


def test_imports_parents_and_strangers(package):
    package.write("steps.", "")
    package.write("steps.step", "from jacnorm import helper")
    package.write("helper", "x = 1")
    package.write("stranger", "x = 1")
    before = code_version("jacnorm.steps.step")
    package.write("stranger", "x = 2")
    assert code_version("jacnorm.steps.step") == before
    package.write("steps.neighbour", "x = 2")
    assert code_version("jacnorm.steps.step") == before
    seen = {before}
    for name, text in {"helper": "x = 2", "steps.": "x = 2", "": "x = 2"}.items():  # parents run on import
        package.write(name, text)
        seen.add(code_version("jacnorm.steps.step"))
    assert len(seen) == 4


def test_a_module_that_moves_counts(package):
    package.write("step", "from jacnorm import a")
    package.write("a", "x = 1")
    before = code_version("jacnorm.step")
    (package.root / "a.py").unlink()
    package.write("a.", "x = 1")
    assert code_version("jacnorm.step") == before  # jacnorm.a is now a package, with the same content
    package.write("a.b", "x = 1")
    package.write("step", "from jacnorm.a import b")
    assert code_version("jacnorm.step") != before


@pytest.mark.parametrize("name", ["jacnorm.nowhere", "jacnorm.step.attribute", "torch", "jacnormal.step"])
def test_what_is_no_module_of_the_package_is_refused(package, name):
    package.write("step", "attribute = 1")
    with pytest.raises(ModuleNotFoundError, match=name):
        code_version(name)


def test_the_digest_is_sixteen_digits_and_repeatable(package):
    package.write("step", STEP)
    first = code_version("jacnorm.step")
    assert len(first) == 16
    assert set(first) <= set("0123456789abcdef")
    package.write("step", STEP)
    assert code_version("jacnorm.step") == first


def test_steps_of_this_project_differ():
    steps = [f"jacnorm.studies.stability.{step}" for step in ("train", "measure", "figures", "judge")]
    assert len({code_version(step) for step in steps}) == len(steps)
    assert "jacnorm.nets.mlp" in closure(steps[0])
    assert "jacnorm.nets.mlp" not in closure(steps[3])
