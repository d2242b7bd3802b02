"""Who imports whom, and what importing costs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import cogvid

ROOT = Path(__file__).parents[2]
LOWER = {"config", "rope", "sampler", "image", "video"}
MODELS = {"config", "ops", "rope"}

# module of cogvid -> the modules of cogvid that it may import; "" is the package itself
INTERNAL = {
    "": set(),  # its imports happen in __getattr__ alone
    "__main__": {"cli"},
    "config": set(),
    "versions": set(),
    "rope": {"config"},
    "sampler": {"config"},
    "download": set(),
    "image": {"config", "download"},
    "video": {"config", "download", "versions"},
    "ops": {"versions"},
    "transformer": MODELS,
    "vae": MODELS,
    "hub": {"config", "download", "versions"},
    "text": {"config", "versions", "ops", "hub", "weights"},
    "tiling": set(),
    "weights": {"config", "ops", "transformer", "vae", "hub"},
    "lora": {"config", "transformer", "vae", "weights"},
    "plan": LOWER | MODELS | {"transformer", "vae", "text", "tiling", "hub", "weights", "lora"},
    "pipeline": {"", "plan", "versions"}
    | LOWER
    | MODELS
    | {"transformer", "vae", "text", "tiling", "hub", "weights", "lora"},
    "cli": {"", "config", "versions", "plan", "pipeline"},
}
TENSORS = {"torch", "numpy", "einops"}
# module of cogvid -> what it may import from outside at its top, and, inside a function, besides
EXTERNAL: dict[str, tuple[set[str], set[str]]] = {
    "config": (set(), set()),
    "versions": (set(), set()),
    "download": (set(), set()),
    "image": (TENSORS, {"PIL"}),
    "video": (TENSORS, {"av", "PIL"}),
    "ops": (TENSORS, {"cogvid_kernels"}),
    "text": (TENSORS, {"transformers", "sentencepiece"}),
    "hub": (set(), {"huggingface_hub"}),
    "weights": (TENSORS | {"safetensors"}, set()),
    "lora": (TENSORS | {"safetensors"}, {"huggingface_hub"}),
    "pipeline": (TENSORS | {"tqdm"}, {"PIL"}),
    "cli": (set(), {"tqdm"}),
    "__main__": (set(), set()),
    "": (set(), set()),
}
MODULES = sorted((ROOT / "cogvid").glob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield each imported dotted name and whether that happens when the module is imported."""

    def walk(node: ast.AST, at_top: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_top) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            yield from ((f"{module}.{a.name}" if module == "cogvid" else module, at_top) for a in node.names)
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from walk(child, at_top and not inside)

    return walk(ast.parse(path.read_text()), True)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_import_rules_hold(path: Path) -> None:
    name = "" if path.stem == "__init__" else path.stem
    assert name in INTERNAL, f"cogvid/{path.name} has no entry in the table of import rules"
    at_top, inside = EXTERNAL.get(name, (TENSORS, set()))
    for imported, when_imported in imports(path):
        top, _, rest = imported.partition(".")
        if top == "cogvid":
            assert rest.partition(".")[0] in INTERNAL[name], f"cogvid/{path.name} imports {imported}"
        elif top not in sys.stdlib_module_names:
            allowed = at_top if when_imported else at_top | inside
            assert top in allowed, f"cogvid/{path.name} imports {imported}"


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.stem)
def test_kernels_import_only_torch_and_triton(path: Path) -> None:
    for imported, _ in imports(path):
        top = imported.partition(".")[0]
        assert top in {"torch", "triton", "cogvid_kernels", *sys.stdlib_module_names}, f"{path.name}: {imported}"


def test_kernels_folder_is_no_package() -> None:
    """It would shadow the package `kernels` of PyPI, which transformers and diffusers probe by name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_tests_can_be_collected_without_diffusers() -> None:
    """Those in tests/parity are left out as a whole; the others ask for it where they need it."""
    needing = {"tests/schedulers.py"}
    for path in [*(ROOT / "tests").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        if path.parent.name == "parity" or str(path.relative_to(ROOT)) in needing:
            continue
        at_top = {name for name, when_imported in imports(path) if when_imported}
        assert "tests.schedulers" not in at_top, path
        assert not [name for name in at_top if name.partition(".")[0] == "diffusers"], path


def test_public_names_exist_and_are_lazy() -> None:
    for name in cogvid.__all__:
        assert getattr(cogvid, name) is not None
        assert name in dir(cogvid)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = cogvid.nothing
    code = (
        "import sys, cogvid; heavy = {'torch', 'numpy', 'PIL', 'av', 'transformers'} & set(sys.modules); print(heavy)"
    )
    assert run_python("-c", code) == "set()\n"


def test_help_imports_no_torch() -> None:
    code = """
import sys
from cogvid.cli import main
for argv in (["--help"], ["generate", "--help"], ["inspect", "--help"], ["--version"]):
    try:
        main(argv)
    except SystemExit as exit:
        assert exit.code == 0
assert main(["generate", "x", "--no-such-option"]) == 2
print({"torch", "numpy", "PIL", "av", "transformers"} & set(sys.modules))
"""
    assert run_python("-c", code).endswith("set()\n")


def test_import_is_under_half_and_help_under_a_third_of_import_torch() -> None:
    """In processor time, which other work on the machine does not lengthen as it does the time on the clock."""
    commands = {
        "torch": ("-c", "import torch"),
        "cogvid": ("-c", "import cogvid"),
        "help": ("-m", "cogvid", "--help"),
    }
    seconds = {}
    for name, command in commands.items():
        before = os.times()
        run_python(*command)
        after = os.times()
        seconds[name] = after.children_user + after.children_system - before.children_user - before.children_system
    assert seconds["cogvid"] < seconds["torch"] / 2, seconds  # measured: 0.03
    assert seconds["help"] < seconds["torch"] / 3, seconds  # measured: 0.06


def test_version_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cogvid.__version__ == project["version"]


def run_python(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout
