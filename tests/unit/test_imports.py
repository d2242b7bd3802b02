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
import file_table

ROOT = Path(__file__).parents[2]
# An import goes only to the left. Rooms on one step never import each other; the files of a room may.
STEPS = (
    {"json_config", "config", "options", "versions", "ops", "media"},
    {"models", "sampling"},
    {"weights"},
    {"parallel"},
    {"run"},
    {"compat"},
    {"ui"},
    {"arguments"},
    {"cli"},
    {"__main__"},
)
# Files beside the rooms, on the first step: what they may import of it.
FIRST_STEP = {
    "json_config": set(),
    "config": {"json_config"},
    "options": set(),
    "versions": set(),
    "ops": {"config", "versions"},
    "media": {"versions"},
}
TENSORS = {"torch", "numpy", "einops"}
# file of cogvid -> what it may import from outside at its top, and, inside a function, besides; TENSORS if not named
EXTERNAL: dict[str, tuple[set[str], set[str]]] = {
    "": (set(), set()),
    "__main__": (set(), set()),
    "config": (set(), set()),
    "options": (set(), set()),
    "json_config": (set(), set()),
    "versions": (set(), set()),
    "cli": (set(), set()),
    "arguments": (set(), set()),
    "ops": (TENSORS, {"cogvid_kernels"}),
    "media.download": (set(), set()),
    "media.image": (TENSORS, {"PIL"}),
    "media.video": (TENSORS, {"av", "PIL"}),
    "media.frame_times": (TENSORS, {"av"}),
    "media.pictures": (TENSORS, {"PIL"}),
    "media.whole_file": (set(), set()),
    "media.tokenizer": (TENSORS, {"sentencepiece"}),
    "models.text": (TENSORS, {"transformers"}),
    "weights.load_options": (set(), set()),
    "weights.lora_option": (set(), set()),
    "weights.parallel_option": (set(), set()),
    "parallel.costs": (set(), set()),
    "weights.lora_file": (TENSORS | {"safetensors"}, set()),
    "weights.hub": (set(), {"huggingface_hub"}),
    "weights.files": (TENSORS | {"safetensors"}, set()),
    "weights.load": (TENSORS | {"safetensors"}, {"transformers"}),
    "compat.media": (TENSORS, {"PIL"}),
    "compat.pipelines": (TENSORS, {"PIL"}),
    "run.settings": (set(), set()),
    "ui": (set(), set()),
    "ui.command": (set(), {"gradio"}),
    "ui.fields": (set(), set()),
    "ui.guard": (set(), set()),
    "ui.page": ({"gradio"}, set()),
    "ui.past": (set(), {"PIL"}),
    "ui.pictures": (set(), {"PIL"}),
    "ui.preview": (TENSORS, {"PIL"}),
    "ui.server": ({"fastapi", "gradio", "uvicorn"}, set()),
    "ui.views": (set(), set()),
    "run.capture": (TENSORS | {"safetensors"}, set()),
    "run.compare": (TENSORS, {"PIL"}),
    "run.lpips": (TENSORS, {"torchmetrics", "torchvision"}),
    "run.noise": (TENSORS | {"safetensors"}, set()),
    "run.trajectory": (TENSORS | {"safetensors"}, set()),
    "run.pipeline": (TENSORS | {"tqdm"}, set()),
    "run.enhance": (set(), set()),
    "run.batch": (TENSORS | {"tqdm"}, set()),
    "run.pool": (TENSORS | {"tqdm"}, set()),
    "run.ray_batch": (TENSORS, {"ray"}),
    "run.invert": (TENSORS | {"tqdm"}, set()),
    "run.jobs": (set(), set()),
    "run.manifest": (set(), set()),
    "run.generate": (TENSORS | {"tqdm"}, set()),
    "run.output": (TENSORS, {"PIL"}),
    "run.resume": (TENSORS, {"PIL"}),
    "run.saved_run": (TENSORS | {"safetensors"}, set()),
    "run.signals": (set(), set()),
    "run.errors": (set(), set()),
    "run.stages": (TENSORS | {"tqdm"}, set()),
    "run.steps": (TENSORS | {"tqdm"}, set()),
    "ui.report": ({"jinja2", "markupsafe"}, set()),
    "ui.report_charts": (set(), set()),
    "ui.report_sweep": ({"tqdm"}, set()),
}
MODULES = sorted((ROOT / "cogvid").rglob("*.py"))
BENCH = sorted((ROOT / "kernels" / "cogvid_kernels" / "bench").glob("*.py"))
KERNELS = sorted({*(ROOT / "kernels").rglob("*.py")} - {*BENCH})


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


def name_of(path: Path) -> str:
    """The dotted name of a file of cogvid within the package; "" for the package itself."""
    return ".".join(path.relative_to(ROOT / "cogvid").with_suffix("").parts).removesuffix("__init__").rstrip(".")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_to_the_left(path: Path) -> None:
    name = name_of(path)
    room = name.partition(".")[0]
    [step] = [i for i, rooms in enumerate(STEPS) if room in rooms] or [len(STEPS)] if name else [0]
    left = set().union(*STEPS[:step])
    allowed = FIRST_STEP.get(room, left) | ({room} if "." in name or path.name == "__init__.py" else set())
    for imported, _ in imports(path):
        top, _, rest = imported.partition(".")
        if top != "cogvid":
            continue
        target = rest.partition(".")[0]
        if target in ("", "__version__"):  # the package itself, which imports nothing
            assert name, "the package imports itself"
        else:
            assert target in allowed, f"{name} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_outside_packages_are_imported_where_they_belong(path: Path) -> None:
    name = name_of(path)
    at_top, inside = EXTERNAL.get(name, (TENSORS, set()))
    for imported, when_imported in imports(path):
        top = imported.partition(".")[0]
        if top != "cogvid" and top not in sys.stdlib_module_names:
            allowed = at_top if when_imported else at_top | inside
            assert top in allowed, f"{name} imports {imported}"


def test_every_file_has_a_room() -> None:
    names = {name_of(path).partition(".")[0] for path in MODULES} - {""}
    assert names == set().union(*STEPS)


def test_the_import_rule_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for room, line in (
        ("media", "from cogvid.models import vae"),
        ("sampling", "import cogvid.models.transformer"),
        ("models", "from cogvid.weights.hub import find"),
        ("weights", "from cogvid import run"),
        ("run", "import cogvid.cli"),
    ):
        path = tmp_path / "cogvid" / room / "wrong.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(line + "\n")
        monkeypatch.setitem(globals(), "ROOT", tmp_path)
        with pytest.raises(AssertionError, match=f"{room}.wrong imports cogvid"):
            test_imports_go_to_the_left(path)


# What a reader has to hold in the head: the core, and the longest function and file.
LONG = {"__call__"}  # of the pipeline, whose signature and docstring are the contract


def test_the_core_is_short() -> None:
    assert sum(file_table.lines(path) for path in file_table.core()) < 2600


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 620
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name not in LONG:
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.stem)
def test_kernels_import_only_torch_and_triton(path: Path) -> None:
    for imported, _ in imports(path):
        top = imported.partition(".")[0]
        assert top in {"torch", "triton", "cogvid_kernels", *sys.stdlib_module_names}, f"{path.name}: {imported}"
        assert not imported.startswith("cogvid_kernels.bench"), f"{path.name}: {imported}"


# Of the benchmark: what it compares with and draws with, where that is installed.
OPTIONAL = {"diffusers", "transformers", "matplotlib"}


@pytest.mark.parametrize("path", BENCH, ids=lambda p: p.stem)
def test_the_benchmark_is_a_program_over_both_packages(path: Path) -> None:
    """It alone in cogvid_kernels may import cogvid, whose `ops` is the reference; nothing there imports it."""
    for imported, when_imported in imports(path):
        top = imported.partition(".")[0]
        if top in sys.stdlib_module_names:
            continue
        assert top in {"torch", "cogvid", "cogvid_kernels"} | (set() if when_imported else OPTIONAL), imported
        assert imported != "cogvid.cli"
    assert len(path.read_text().splitlines()) <= 620


def test_cogvid_does_not_import_the_benchmark() -> None:
    for path in MODULES:
        assert not [name for name, _ in imports(path) if name.startswith("cogvid_kernels.")], path


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
commands = ("generate", "inspect", "batch", "enhance", "report", "ui")
for argv in ("--help", *(f"{command} --help" for command in commands), "--version"):
    try:
        main(argv.split())
    except SystemExit as exit:
        assert exit.code == 0
assert main(["generate", "x", "--no-such-option"]) == 2
print({"torch", "numpy", "PIL", "av", "transformers", "gradio"} & set(sys.modules))
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
