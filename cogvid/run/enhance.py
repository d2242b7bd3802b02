"""Turn a short prompt into the long form that the models were trained on, with a language model behind a URL.

The protocol is the chat completions of OpenAI, which other servers speak too. What is asked for is what upstream's
`inference/convert_demo.py` asks for, in other words, with the same sampling. This file imports no torch.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import time
import urllib.parse
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cogvid.media.download import Refused, checked_url, post, shown, status_line
from cogvid.run.signals import stop_if_asked

if TYPE_CHECKING:
    from cogvid.media.image import ImageSource
    from cogvid.run.generate import Job

KEY, BASE_URL = "OPENAI_API_KEY", "OPENAI_BASE_URL"  # of the environment
DEFAULT_LLM = "gpt-4o"
TRIES = 3
_SAMPLING = {"temperature": 0.01, "top_p": 0.7, "max_tokens": 250, "stream": False}
_FIRST_WAIT = 1.0  # seconds, doubled from try to try, where the server names no time
_MAX_BYTES = 2**20  # of an answer
_MAX_LENGTH = 4000  # characters of a long prompt; T5 reads about 1000
_MAX_SIDE = 1024  # pixels of the image that is sent
_SHORTEST_SECRET = 8  # characters; a shorter value in a query says nothing, and may stand in any text

_WANTED = """
Write in English, whatever language the user writes in: one paragraph of plain prose, 100 to 150 words, in the present
tense. Keep all that the user asks for and contradict none of it. Describe only what can be seen: the subject and how it
looks, what it does from the first moment of the clip to the last, the place and what is around the subject, the light
and the time of day, where the camera stands and how it moves, the style and the mood. Answer with the description
alone, without a title, a list, quotation marks or a remark.
"""
_OF_TEXT = f"""
You write prompts for a model that makes a video of a few seconds from a text. It was trained on long, detailed
descriptions, so a short prompt gives a poor video. Expand the user's short prompt into such a description.
{_WANTED}"""
_OF_IMAGE = f"""
You write prompts for a model that makes a video of a few seconds from a picture and a text. The user gives you the
picture, which is the first frame, and perhaps a short text. Describe what the picture shows, exactly as it is there,
and then how it moves from there on. If the user gives a text, that is what happens. If not, choose a motion that is
natural for the scene. All is one shot from one viewpoint: no cut, no other scene, no jump of the camera. Name things
and people directly, and never say that there is a picture or a video.
{_WANTED}"""


def enhance(
    prompt: str,
    url: str | None = None,
    *,
    llm: str = DEFAULT_LLM,
    image: ImageSource | None = None,
    timeout: float = 120.0,
) -> str:
    """Return the long form of a prompt: one paragraph of English, asked for 100 to 150 words.

    T5 reads 226 tokens, about 150 words. A longer text is returned whole; what is beyond is not used in a run, which
    warns of it. The key of the environment's OPENAI_API_KEY, if there is one, is sent to the host of the URL alone.

    Args:
        prompt: may be empty with an image.
        url: base URL of an OpenAI-compatible server, such as "https://api.openai.com/v1", without user name and
            password; None is that of the environment's OPENAI_BASE_URL. Redirects are not followed.
        llm: the server's name of a language model; with an image it must be one that sees.
        image: the first frame, anything that `load_image` takes. It is sent as a JPEG of at most 1024 pixels a side.
        timeout: seconds for all. The status 429 and those from 500 are tried 3 times.

    Raises:
        ValueError: no usable answer came. No message has the key, or the query of the URL.
    """
    _check_text("prompt", prompt)
    _check_text("llm", llm)
    if image is None and not prompt.strip():
        raise ValueError("prompt: got an empty one, want words or an image")
    address, key = chat_address(url), _key()
    told: Any = prompt
    if image is not None:
        told = [{"type": "image_url", "image_url": {"url": _data_url(image)}}, {"type": "text", "text": prompt}]
    messages = [{"role": "system", "content": (_OF_TEXT if image is None else _OF_IMAGE).strip()}]
    messages += [{"role": "user", "content": told}]
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    reply = _ask(address, json.dumps({"model": llm, "messages": messages, **_SAMPLING}).encode(), headers, timeout)
    try:
        text = _read(reply)
        query = urllib.parse.parse_qsl(urllib.parse.urlsplit(address).query)
        if any(secret in text for secret in [key, *(v for _, v in query if len(v) >= _SHORTEST_SECRET)] if secret):
            raise Refused("repeats the key or the query of the URL, want a prompt")
    except Refused as error:
        raise ValueError(f"enhance: got an answer of {shown(address)} that {error}") from None
    return text


def enhance_job(job: Job, url: str | None, llm: str | None, kept: Mapping[str, str] | None = None) -> Job:
    """Return a job with the long form of its prompt; its image goes with it. url, llm: None for the defaults.

    kept: that of a saved run, which is not asked for again: `text`, and the values of `Job.enhanced`.

    Raises:
        ValueError: the saved run was begun with another host.
    """
    host = urllib.parse.urlsplit(chat_address(url)).netloc if url is not None or kept is None else kept["host"]
    if kept is None:
        text = enhance(job.inputs["prompt"], url, llm=llm or DEFAULT_LLM, image=job.inputs["image"])
        kept = {"text": text, "prompt": job.inputs["prompt"], "llm": llm or DEFAULT_LLM, "host": host}
    elif kept["host"] != host:
        raise ValueError(f"enhance: got {host}, want {kept['host']} as in the saved run")
    enhanced = {name: kept[name] for name in ("prompt", "llm", "host")}
    return dataclasses.replace(job, inputs={**job.inputs, "prompt": kept["text"]}, enhanced=enhanced)


def chat_address(url: str | None) -> str:
    """Return where the chat completions of a server are, from its base URL. None: that of OPENAI_BASE_URL.

    Raises:
        ValueError: there is none, or it is not one to ask.
    """
    url = os.environ.get(BASE_URL) if url is None else url
    if not url:
        raise ValueError(f"enhance: got no URL, want that of an OpenAI-compatible server, here or in {BASE_URL}")
    try:
        parts = urllib.parse.urlsplit(checked_url(url))
    except (Refused, ValueError) as error:
        said = error if isinstance(error, Refused) else "is not a valid URL, want an http or https URL"
        raise ValueError(f"enhance: got {shown(url)}, which {said}") from None
    if not parts.hostname:
        raise ValueError(f"enhance: got {shown(url)}, which has no host, want an http or https URL")
    path = parts.path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    return urllib.parse.urlunsplit(parts._replace(path=path))


def _key() -> str:
    key = os.environ.get(KEY, "").strip()
    if not all("!" <= character <= "~" for character in key):
        raise ValueError(f"{KEY}: got a value with spaces or characters beyond ASCII, want a key")
    return key


def _ask(address: str, body: bytes, headers: Mapping[str, str], timeout: float) -> bytes:
    """Return the body of the answer with status 200."""
    deadline, status = time.monotonic() + timeout, 0
    for number in range(TRIES):
        stop_if_asked()
        left = max(deadline - time.monotonic(), 0.001)
        status, answered, reply = post("enhance", address, body, headers, timeout=left, max_bytes=_MAX_BYTES)
        if status == 200:
            return reply
        asked = answered.get("Retry-After") or ""
        wait = float(asked) if asked.isascii() and asked.isdigit() else _FIRST_WAIT * 2**number
        if (status != 429 and status < 500) or number == TRIES - 1 or time.monotonic() + wait > deadline:
            break
        time.sleep(wait)
    got = f"{shown(address)}, which was answered with status {status_line(status)}"
    raise ValueError(f"enhance: got {got}, want 200; {_hint(status)}")


def _hint(status: int) -> str:
    if status in (401, 403):
        return f"the key is taken from the environment, {KEY}"
    if 300 <= status < 400:
        return "redirects are not followed, so that the key reaches no other host"
    if status == 429 or status >= 500:
        return f"it was asked up to {TRIES} times"
    return "the server must have the language model (--llm), and one that sees for an image"


def _read(reply: bytes) -> str:
    """Return the text of an answer as one line."""
    try:
        choice = json.loads(reply)["choices"][0]
        text, cut = choice["message"]["content"], choice.get("finish_reason") == "length"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise Refused("is no chat completion, want one of an OpenAI-compatible server") from None
    if text is not None and not isinstance(text, str):
        raise Refused(f"has {type(text).__name__} for text, want a string")
    text = " ".join((text or "").split())
    for left, right in ('""', "“”", "[]"):  # some put their text into them
        if len(text) > 1 and text[0] == left and text[-1] == right:
            text = text[1:-1].strip()
    if not text:
        raise Refused("has no text, want a prompt")
    if len(text) > _MAX_LENGTH:
        raise Refused(f"has {len(text)} characters, want at most {_MAX_LENGTH}")
    if not _is_text(text):
        raise Refused("has control characters, want text")
    if cut:
        warnings.warn(
            f"enhance: got a text that was cut off after {_SAMPLING['max_tokens']} tokens; it is used as it is",
            stacklevel=3,
        )
    return text


def _check_text(name: str, text: str) -> None:
    if not isinstance(text, str) or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{name}: got {text!r:.60}, want text in UTF-8")


def _is_text(text: str) -> bool:
    """Say whether a line can be shown: no control characters, which a terminal obeys, and no halves of characters."""
    return not any(c < " " or "\x7f" <= c < "\xa0" or "\ud800" <= c <= "\udfff" for c in text)


def _data_url(source: ImageSource) -> str:
    from cogvid.media.image import load_image

    image, file = load_image(source), io.BytesIO()
    scale = min(1.0, _MAX_SIDE / max(image.size))
    if scale < 1:
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    image.save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
