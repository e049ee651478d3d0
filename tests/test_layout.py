"""One-way imports, read from the source; what importing the package costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("attacks", "certify", "experiments", "models")
ALLOWED = {
    "attacks": {"attacks"},
    "certify": {"certify"},
    "experiments": {"attacks", "certify", "experiments", "models"},
    "models": {"certify", "models"},
}
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
EVERYTHING = [*SOURCES, ROOT / "__init__.py", ROOT / "cli.py", *sorted((ROOT / "tests").glob("*.py"))]


def name(path):
    return str(path.relative_to(ROOT))


def imports(path):
    """(level, module, names) of each import, also of those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", tuple(alias.name for alias in node.names)


def siblings(path):
    """Packages of this project that a file imports."""
    depth = len(path.relative_to(ROOT).parts) - 1  # 1 in a package
    for level, module, names in imports(path):
        if level == 0 and module.split(".")[0] == "speccert":
            parts = module.split(".")[1:]
            yield from parts[:1] or names
        elif level == depth + 1:
            yield from [module.split(".")[0]] if module else (public for public in names if public in PACKAGES)
        elif level == depth and depth:
            yield path.relative_to(ROOT).parts[0]
        elif level > depth + 1:
            yield "outside the package"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_go_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    assert set(siblings(path)) <= ALLOWED[package]


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_inside_the_package_are_relative(path):
    assert not [
        module for level, module, _ in imports(path) if level == 0 and module.split(".")[0] in ("speccert", *PACKAGES)
    ]


@pytest.mark.parametrize("path", EVERYTHING, ids=name)
def test_nothing_imports_torchvision(path):
    assert not [module for _, module, _ in imports(path) if module.split(".")[0] == "torchvision"]


def test_the_root_holds_the_package_and_the_command_only():
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "cli.py"}
    assert not (ROOT / "tests" / "__init__.py").exists()
    assert not list(imports(ROOT / "__init__.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_exist(package):
    module = __import__(f"speccert.{package}", fromlist=["__all__"])
    assert sorted(module.__all__) == sorted(set(module.__all__))
    assert [public for public in module.__all__ if not hasattr(module, public)] == []


def loaded_by(statement):
    code = f"import sys; {statement}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return set(result.stdout.split())


@pytest.mark.parametrize("statement", ["import speccert", "import speccert.cli"])
def test_start_up_loads_nothing_heavy(statement):
    heavy = {"cvxpy", "matplotlib", "numpy", "pandas", "pyarrow", "scipy", "sklearn", "torch", "torchattacks", "pooch"}
    assert loaded_by(statement) & heavy == set()


def test_certify_loads_no_sibling_and_no_solver():
    code = "import sys, speccert.certify; print(*[m for m in sys.modules if m.startswith('speccert.')])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert {module.split(".")[1] for module in result.stdout.split()} == {"certify"}
