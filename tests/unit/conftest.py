"""What several test modules use."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cogvid import cli
from cogvid.weights.hub import PACKS
from tests.checkpoints import write_checkpoint
from tests.llm_server import LLMServer, serve_llm


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    return shutil.copytree(PACKS / "tiny-t2v", tmp_path / "pack")


@pytest.fixture
def failed(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command, check that it ends in one line with a status; return the line without its start."""

    def run(*arguments: object, status: int = 2) -> str:
        capfd.readouterr()
        assert cli.main([str(argument) for argument in arguments]) == status
        said = capfd.readouterr().err.splitlines()
        errors = [line for line in said if "warning" not in line]
        assert len(errors) == 1, said
        assert len(errors[0]) <= 1100
        return errors[0].removeprefix("cogvid: error: ")

    return run


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> Iterator[LLMServer]:
    """A language model's server, named by OPENAI_BASE_URL."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):  # a proxy could not reach this machine
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serve_llm() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base())
        yield server
