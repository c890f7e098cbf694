"""Private by default: what a public module defines and what its ``__all__`` says are the same."""

import ast
import importlib
from pathlib import Path
from types import ModuleType

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "pmemkit"


def _public_modules() -> list[str]:
    names = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if not any(part.startswith("_") for part in parts):
            names.append(".".join(parts))
    return names


def _file_of(module: str) -> Path:
    path = PACKAGE.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _is_ours(node: ast.ImportFrom) -> bool:
    return bool(node.level) or (node.module or "").split(".")[0] == "pmemkit"


def _defined(module: str) -> set[str]:
    """Public names that a module defines, and what a package passes on from its own modules."""
    path = _file_of(module)
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {
                name.id for t in targets for name in ast.walk(t) if isinstance(name, ast.Name)
            }
        elif isinstance(node, ast.ImportFrom) and path.name == "__init__.py" and _is_ours(node):
            names |= {alias.asname or alias.name for alias in node.names}
    return {name for name in names if not name.startswith("_") or name == "__version__"}


MODULES = _public_modules()


def test_there_are_modules_to_look_at():
    assert {"pmemkit.errors", "pmemkit.units"} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_all_names_what_the_module_defines(module):
    loaded = importlib.import_module(module)
    declared = getattr(loaded, "__all__", None)
    assert declared is not None, f"{module} has no __all__"
    assert len(set(declared)) == len(declared)
    undeclared = _defined(module) - set(declared)
    undeclared -= {name for name in undeclared if isinstance(vars(loaded).get(name), ModuleType)}
    assert not undeclared, f"{module} exposes {sorted(undeclared)}; declare them or hide them"
    absent = [name for name in declared if not hasattr(loaded, name)]
    assert not absent, f"{module} declares {absent} and has no such names"
    if not hasattr(loaded, "__getattr__"):
        borrowed = set(declared) - _defined(module)
        assert not borrowed, f"{module} declares {sorted(borrowed)}, which it does not define"
