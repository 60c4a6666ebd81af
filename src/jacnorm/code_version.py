"""The version of the code that a job executes, as one short digest.

Snakemake sees the text of a rule, not the module behind ``python -m jacnorm.studies.stability.measure``. Rules
therefore carry ``params: code=code_version("jacnorm.studies.stability.measure")``, and a job reruns when that digest
changes.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = "jacnorm"
ROOT = Path(__file__).parent


def code_version(module: str) -> str:
    """Digest of the syntax trees of `module` and of everything in this package that it imports, transitively.

    Comments, docstrings, layout and ``if TYPE_CHECKING:`` blocks do not count; a package's ``__init__`` counts for each
    of its modules because Python executes it first. Imports inside functions count; ``importlib`` does not.
    Returns 16 hexadecimal digits. Raises ModuleNotFoundError if `module` is not part of the package.
    """
    digest = hashlib.sha256()
    for name in sorted(closure(module)):
        digest.update(f"{name}\n{_canonical(_source(name))}\n".encode())
    return digest.hexdigest()[:16]


def closure(module: str) -> frozenset[str]:
    """Names of `module`, its parent packages and every module of this package that they import, transitively."""
    if _source(module) is None:
        raise ModuleNotFoundError(f"no module {module} in {PACKAGE}")
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(_imports(name))
    return frozenset(found)


def _source(module: str) -> Path | None:
    """File of a module or package; None if `module` is an attribute or belongs to another project."""
    parts = module.split(".")
    if parts[0] != PACKAGE:
        return None
    path = ROOT.joinpath(*parts[1:])
    for candidate in (path / "__init__.py", path.with_suffix(".py")):
        if candidate.is_file():
            return candidate
    return None


@cache
def _imports(module: str) -> frozenset[str]:
    path = _source(module)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names = {package} if module != PACKAGE else set()
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base] if base else parent)
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    with_parents = {prefix for name in names for prefix in _prefixes(name)}
    return frozenset(name for name in with_parents if _source(name) is not None)


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:i]) for i in range(1, len(parts) + 1))


@cache
def _tree(path: Path) -> ast.Module:
    """Syntax tree of a file without docstrings and type-checking blocks."""
    return ast.fix_missing_locations(_Strip().visit(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))))


@cache
def _canonical(path: Path) -> str:
    return ast.unparse(_tree(path))


class _Strip(ast.NodeTransformer):
    """Removes what never executes."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.AST]:
        test = node.test
        name = test.id if isinstance(test, ast.Name) else test.attr if isinstance(test, ast.Attribute) else ""
        self.generic_visit(node)
        return node.orelse if name == "TYPE_CHECKING" else node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:]
            if not node.body and not isinstance(node, ast.Module):
                node.body = [ast.Pass()]
        return node
