"""Prompts that a language model makes longer, from a server on this machine."""

from __future__ import annotations

import base64
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import cogvid
from cogvid import cli
from cogvid.run import enhance as enhancing
from cogvid.run.enhance import TRIES, chat_address, enhance
from cogvid.run.replay import check_replayable
from tests.llm_server import LONG, LLMServer, serve_llm

ROOT = Path(__file__).parents[2]
SECRET = "sk-very-secret-0123456789"
QUERY = "query-secret-9876543210"
GENERATE = ("generate", "a red circle", "--num-inference-steps", "2", "--seed", "1")


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET + "\n")
    return SECRET


@pytest.fixture(autouse=True)
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enhancing, "_FIRST_WAIT", 0.01)


def test_a_text_becomes_long(llm: LLMServer, key: str) -> None:
    assert enhance("a red circle", llm.base()) == LONG
    [asked] = llm.requests
    assert asked["model"] == "gpt-4o"
    assert (asked["temperature"], asked["top_p"], asked["max_tokens"], asked["stream"]) == (0.01, 0.7, 250, False)
    assert [message["role"] for message in asked["messages"]] == ["system", "user"]
    assert asked["messages"][1]["content"] == "a red circle"
    assert "first frame" not in asked["messages"][0]["content"]
    assert llm.paths == ["/ok/v1/chat/completions"]
    assert llm.headers[0]["Authorization"] == f"Bearer {key}"


def test_the_image_goes_with_it_scaled_down(llm: LLMServer, tmp_path: Path) -> None:
    Image.new("RGBA", (4000, 10), (200, 30, 40, 255)).save(tmp_path / "wide.png")
    assert enhance("", llm.base(), llm="sees", image=tmp_path / "wide.png") == LONG
    [asked] = llm.requests
    assert asked["model"] == "sees"
    assert "first frame" in asked["messages"][0]["content"]
    picture, text = asked["messages"][1]["content"]
    assert text == {"type": "text", "text": ""}
    start, _, data = picture["image_url"]["url"].partition(",")
    assert (picture["type"], start) == ("image_url", "data:image/jpeg;base64")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.size == (1024, 3)
    red, green, blue = image.getpixel((500, 1))  # pyright: ignore[reportGeneralTypeIssues]
    assert abs(red - 200) < 8
    assert abs(green - 30) < 8
    assert abs(blue - 40) < 8


def test_without_a_key_none_is_sent(llm: LLMServer) -> None:
    assert enhance("a red circle") == LONG  # OPENAI_BASE_URL names the server
    assert "Authorization" not in llm.headers[0]


@pytest.mark.parametrize("text", [f'"{LONG}"', f"[{LONG}]", f"  {LONG[:30]}\n\n{LONG[30:]} ", f"“{LONG}”"])
def test_what_a_model_puts_around_its_text_is_taken_off(text: str, llm: LLMServer) -> None:  # noqa: ARG001 - proxies
    with serve_llm(text) as server:
        assert enhance("a red circle", server.base()).split() == LONG.split() or text.startswith(" ")
        assert "\n" not in enhance("a red circle", server.base())


def test_a_text_that_was_cut_off_is_warned_of(llm: LLMServer) -> None:
    with pytest.warns(UserWarning, match="enhance: got a text that was cut off after 250 tokens"):
        assert enhance("a red circle", llm.base("cut")) == LONG


@pytest.mark.parametrize(
    ("kind", "tries", "said"),
    [
        ("refused", 1, "status 401 Unauthorized, want 200; the key is taken from the environment, OPENAI_API_KEY"),
        ("missing", 1, "status 404 Not Found, want 200; the server must have the language model"),
        ("broken", TRIES, "status 500 Internal Server Error, want 200; it was asked up to 3 times"),
        ("busy_long", 1, "status 429 Too Many Requests, want 200"),
        ("garbage", 1, "is no chat completion, want one of an OpenAI-compatible server"),
        ("nested", 1, "is no chat completion"),
        ("other", 1, "is no chat completion"),
        ("number", 1, "has int for text, want a string"),
        ("nothing", 1, "has no text, want a prompt"),
        ("blank", 1, "has no text, want a prompt"),
        ("escape", 1, "has control characters, want text"),
        ("surrogate", 1, "has control characters, want text"),
        ("huge", 1, "has 6999 characters, want at most 4000"),
        ("empty", 1, "is empty, want a reply"),
        ("endless", 1, "has more than 1048576 bytes, want at most that many"),
        ("echo", 1, "repeats the key or the query of the URL, want a prompt"),
    ],
)
def test_a_bad_answer_is_one_line_without_secrets(
    kind: str, tries: int, said: str, llm: LLMServer, key: str, failed: Callable[..., str]
) -> None:
    line = failed("enhance", "a red circle", "--url", f"{llm.base(kind)}?code={QUERY}")
    assert said in line
    assert line.startswith("enhance: got ")
    assert key not in line
    assert QUERY not in line
    assert len(llm.paths) == tries
    assert llm.paths[0] == f"/{kind}/v1/chat/completions?code={QUERY}"


def test_an_answer_that_repeats_the_query_is_refused(llm: LLMServer) -> None:
    with pytest.raises(ValueError, match="repeats the key or the query"):
        enhance("a red circle", f"{llm.base('echo')}?code={QUERY}")


def test_a_busy_server_is_asked_again(llm: LLMServer) -> None:
    assert enhance("a red circle", llm.base("busy_once")) == LONG
    assert len(llm.paths) == 2


@pytest.mark.parametrize("kind", ["stall", "drip"])
def test_a_slow_server_is_given_up(kind: str, llm: LLMServer) -> None:
    begun = time.monotonic()
    with pytest.raises(ValueError, match=r"was not received within .* seconds, want a server that answers in time"):
        enhance("a red circle", llm.base(kind), timeout=0.5)
    assert time.monotonic() - begun < 20


def test_a_redirect_is_not_followed(llm: LLMServer, key: str) -> None:
    with (
        serve_llm(llm.base() + "/chat/completions") as first,
        pytest.raises(ValueError, match="status 307 Temporary Redirect, want 200; redirects are not followed") as error,
    ):
        enhance("a red circle", first.base("elsewhere"))
    assert first.headers[0]["Authorization"] == f"Bearer {key}"
    assert not llm.paths
    assert key not in str(error.value)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://host/v1", "leads to the scheme 'ftp', want http or https"),
        ("host/v1", "want http or https"),
        ("", "got no URL"),
        ("http:///v1", "has no host"),
        ("http://host:port/v1", "is not a valid URL"),
        (f"https://me:{SECRET}@host/v1", "has a user name or a password"),
    ],
)
def test_a_url_that_is_none_is_refused_before_the_work(
    url: str, said: str, tmp_path: Path, failed: Callable[..., str]
) -> None:
    for arguments in (["enhance", "x", "--url", url], [*GENERATE, "-o", tmp_path / "x.mp4", "--enhance", url]):
        line = failed(*arguments)
        assert said in line
        assert line.startswith("enhance: got ")
        assert SECRET not in line


def test_no_url_is_one_line(monkeypatch: pytest.MonkeyPatch, failed: Callable[..., str]) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert failed("enhance", "x") == (
        "enhance: got no URL, want that of an OpenAI-compatible server, here or in OPENAI_BASE_URL"
    )


def test_a_closed_port_is_one_line(llm: LLMServer, failed: Callable[..., str]) -> None:
    with serve_llm() as gone:
        url = gone.base()
    assert "cannot be fetched" in failed("enhance", "x", "--url", url)
    assert not llm.paths


def test_a_key_that_is_none_is_not_shown(
    llm: LLMServer, monkeypatch: pytest.MonkeyPatch, failed: Callable[..., str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\r\nX-Other: {SECRET}")
    assert failed("enhance", "x") == ("OPENAI_API_KEY: got a value with spaces or characters beyond ASCII, want a key")
    assert not llm.paths


def test_an_empty_prompt_needs_an_image(llm: LLMServer, failed: Callable[..., str]) -> None:
    assert failed("enhance", " ") == "prompt: got an empty one, want words or an image"
    assert not llm.paths


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("https://api.openai.com/v1", "https://api.openai.com/v1/chat/completions"),
        ("https://api.openai.com/v1/", "https://api.openai.com/v1/chat/completions"),
        ("https://h/v1/chat/completions", "https://h/v1/chat/completions"),
        ("https://h/openai/x?api-version=1#part", "https://h/openai/x/chat/completions?api-version=1"),
        ("http://[::1]:8080", "http://[::1]:8080/chat/completions"),
    ],
)
def test_the_address_follows_from_the_base_url(url: str, address: str) -> None:
    assert chat_address(url) == address


def test_the_command_prints_the_text_alone(llm: LLMServer, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["enhance", "a red circle", "--image", str(ROOT / "scripts" / "demo.png"), "--llm", "sees"]) == 0
    assert capfd.readouterr() == (LONG + "\n", "")
    assert llm.requests[0]["messages"][1]["content"][0]["type"] == "image_url"


def test_a_run_uses_the_long_prompt_and_replays_without_asking(
    llm: LLMServer, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    url = f"{llm.base()}?code={QUERY}"
    side = ["--sidecar", "side.json", "--save-trajectory", "t.safetensors"]
    assert cli.main([*GENERATE, "-o", "long.mp4", "--enhance", url, "--verbose", *side]) == 0
    assert cli.main(["generate", LONG, *GENERATE[2:], "-o", "plain.mp4"]) == 0
    record, plain = cogvid.read_record("long.mp4"), cogvid.read_record("plain.mp4")
    assert record["prompt"] == [LONG]
    host = llm.url.removeprefix("http://")
    assert record.pop("enhanced") == {"prompt": "a red circle", "llm": "gpt-4o", "host": host}
    assert record == plain
    assert cogvid.read_video("long.mp4")[0].equal(cogvid.read_video("plain.mp4")[0])
    assert f"prompt {LONG}" in capfd.readouterr().err
    assert len(llm.paths) == 1
    with pytest.raises(ValueError, match="enhanced: got 'text' in the record of"):
        check_replayable({**plain, "enhanced": "text"}, "long.mp4")
    monkeypatch.delenv("OPENAI_BASE_URL")
    assert cli.main(["replay", "long.mp4", "-o", "again.mp4"]) == 0
    said = "".join(capfd.readouterr())
    assert len(llm.paths) == 1
    assert Path("again.mp4").read_bytes() == Path("long.mp4").read_bytes()
    for secret in (key, QUERY):
        assert secret not in said
        for path in tmp_path.rglob("*"):
            assert path.is_dir() or secret.encode() not in path.read_bytes(), path


def test_an_image_of_a_run_is_seen(llm: LLMServer, tmp_path: Path) -> None:
    image = ["--image", str(ROOT / "scripts" / "demo.png")]
    assert cli.main([*GENERATE, *image, "-o", str(tmp_path / "x.mp4"), "--enhance", llm.base()]) == 0
    picture = llm.requests[0]["messages"][1]["content"][0]["image_url"]["url"]
    assert Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))).size == (
        Image.open(ROOT / "scripts" / "demo.png").size
    )


@pytest.mark.slow
def test_a_saved_run_goes_on_with_the_same_prompt(
    llm: LLMServer, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failed: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    url = f"{llm.base()}?code={QUERY}"
    begin = [*GENERATE, "-o", "x.mp4", "--enhance", url, "--llm", "other"]
    assert cli.main([*begin, "--checkpoint", "run"]) == 0
    whole = Path("x.mp4").read_bytes()
    Path("x.mp4").unlink()
    monkeypatch.delenv("OPENAI_BASE_URL")
    for arguments in (["generate", "--resume", "run"], [*begin, "--resume", "run"]):
        assert cli.main(arguments) == 0
        assert Path("x.mp4").read_bytes() == whole
    assert len(llm.paths) == 1
    assert cogvid.read_record("x.mp4")["enhanced"]["llm"] == "other"
    elsewhere = failed("generate", "--resume", "run", "--enhance", "http://elsewhere/v1")
    assert elsewhere.startswith("enhance: got elsewhere, want 127.0.0.1:")
    assert failed("generate", "--resume", "run", "--llm", "third").startswith("llm: got 'third', want 'other'")
    for path in Path("run").rglob("*"):
        assert not {name for name in (key, QUERY) if name.encode() in path.read_bytes()}, path


def test_a_run_that_was_begun_without_is_not_enhanced(
    llm: LLMServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failed: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([*GENERATE, "-o", "x.mp4", "--checkpoint", "run"]) == 0
    line = failed("generate", "--resume", "run", "--enhance", llm.base())
    assert line == "enhance: got a URL, want none as in the run saved in run"
    assert not llm.paths


def test_where_it_does_not_apply_one_line_says_so(llm: LLMServer, tmp_path: Path, failed: Callable[..., str]) -> None:
    line = failed("batch", "--prompt", "x", "-o", tmp_path / "out", "--enhance", llm.base())
    assert line.startswith("enhance: got it for a batch, want the long prompts in JOBS")
    line = failed(*GENERATE, "-o", tmp_path / "x.mp4", "--llm", "other")
    assert line == "llm: got 'other' without --enhance, want both or neither"
    assert not llm.paths
    assert not list(tmp_path.iterdir())


def test_a_failed_request_leaves_nothing(llm: LLMServer, tmp_path: Path, failed: Callable[..., str]) -> None:
    assert "404" in failed(*GENERATE, "-o", tmp_path / "x.mp4", "--enhance", llm.base("missing"))
    assert not list(tmp_path.iterdir())


def test_ctrl_c_stops_at_once(llm: LLMServer) -> None:
    command = [sys.executable, "-m", "cogvid", "enhance", "a red circle", "--url", llm.base("stall")]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what runs in the background ignores it
    )
    while not llm.paths:
        assert process.poll() is None
        time.sleep(0.02)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert time.monotonic() - begun < 10
    assert (process.returncode, said) == (130, "cogvid: error: interrupted\n")


def test_a_traceback_has_no_secret(llm: LLMServer, key: str) -> None:
    url = f"{llm.base('refused')}?code={QUERY}"
    command = [sys.executable, "-m", "cogvid", "enhance", "a red circle", "--url", url, "--traceback"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert key not in done.stderr
    assert QUERY not in done.stderr
