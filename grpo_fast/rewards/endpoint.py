"""Asks an OpenAI-compatible endpoint: bounded in requests at once and in all, tokens and time."""

from __future__ import annotations

import asyncio
import email.message
import http.client
import json
import logging
import os
import random
import threading
import urllib.error
import urllib.request
from typing import Any

from .background import DaemonThreads

logger = logging.getLogger(__name__)

# an answer of a judge is a page at most
_BYTES = 1 << 20
_LONGEST_WAIT = 60.0
# the server is busy, or has an accident; every other error is the request's and stays one
_TRY_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
# its own generator: what waits must not draw from the one that samples
_JITTER = random.Random()


class Refused(ValueError):
    """The server will not answer, however often it is asked: a wrong key, model or address."""


class Unanswered(Exception):
    """No answer to one request: no connection, no time, or the budget is spent."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *arguments: Any, **keywords: Any) -> None:
        return None


class Endpoint:
    """`POST url/chat/completions`, and the text of the first choice.

    Args:
        url: base address, such as http://127.0.0.1:8000/v1.
        model: the model's name there.
        key: name of the environment variable with the key; an unset one means no key.
        concurrency: requests at once.
        timeout: seconds for one request.
        retries: further attempts after a busy server, an accident or no connection, after 1, 2,
            4, ... seconds (half to all of that, at random) or what a Retry-After header says.
        max_requests, max_tokens_total: budget of the run, attempts and tokens; None: no limit.
            Where the server does not say what it used, four characters count as a token.
        settings: further fields of the request, such as temperature.

    Raises:
        ValueError: for an address that is no http or https address, or a number out of range.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str,
        concurrency: int,
        timeout: float,
        retries: int,
        max_requests: int | None,
        max_tokens_total: int | None,
        settings: dict[str, Any],
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url: expected http://... or https://..., got {url!r}.")
        for name, value, low in (
            ("concurrency", concurrency, 1),
            ("retries", retries, 0),
            ("max_requests", max_requests, 1),
            ("max_tokens_total", max_tokens_total, 1),
        ):
            if value is not None and (not isinstance(value, int) or value < low):
                raise ValueError(f"{name}: expected an integer >= {low}, got {value!r}.")
        if not timeout > 0:
            raise ValueError(f"timeout: expected seconds > 0, got {timeout!r}.")
        self.url, self.model = url.rstrip("/") + "/chat/completions", model
        self._key, self._timeout, self._retries = key, timeout, retries
        self._max_requests, self._max_tokens = max_requests, max_tokens_total
        self._settings, self._concurrency = settings, concurrency
        self._threads = DaemonThreads(concurrency)
        self._opener = urllib.request.build_opener(_NoRedirect())
        self._lock = threading.Lock()
        self.requests = self.tokens = 0

    async def ask_all(self, conversations: list[list[dict[str, str]]]) -> list[str | None]:
        """The answers in order; None where there was none.

        Raises:
            Refused: when the server will not answer; the requests that wait are given up.
        """
        free = asyncio.Semaphore(self._concurrency)

        async def one(messages: list[dict[str, str]]) -> str | None:
            async with free:
                try:
                    return await self._attempts(messages)
                except Unanswered as error:
                    self._warn(str(error))
                    return None

        tasks = [asyncio.ensure_future(one(messages)) for messages in conversations]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _attempts(self, messages: list[dict[str, str]]) -> str:
        wait = 1.0
        for attempt in range(self._retries + 1):
            self._spend()
            try:
                posted = asyncio.get_running_loop().run_in_executor(
                    self._threads, self._post, messages
                )
                # the timeout of a socket is one of each read: a server that drips has none
                return await asyncio.wait_for(posted, 2 * self._timeout)
            except urllib.error.HTTPError as error:
                reason, after = f"status {error.code}", _retry_after(error.headers)
                if error.code not in _TRY_AGAIN:
                    body = " ".join(_body(error).split())[:300]
                    raise Refused(f"{self.url} answered {error.code}: {body}") from None
            # no connection, a broken one, or no answer in time
            except (
                TimeoutError,
                asyncio.TimeoutError,
                OSError,
                http.client.HTTPException,
                ValueError,
            ) as error:
                reason, after = f"{type(error).__name__}: {error}", None
            if attempt < self._retries:
                pause = wait * (0.5 + _JITTER.random() / 2) if after is None else after
                await asyncio.sleep(min(pause, _LONGEST_WAIT))
                wait *= 2
        raise Unanswered(f"{self.url} gave no answer in {self._retries + 1} attempts ({reason})")

    def _spend(self) -> None:
        with self._lock:
            if self._max_requests is not None and self.requests >= self._max_requests:
                raise Unanswered(f"the budget of {self._max_requests} requests is spent")
            if self._max_tokens is not None and self.tokens >= self._max_tokens:
                raise Unanswered(f"the budget of {self._max_tokens} tokens is spent")
            self.requests += 1

    def _post(self, messages: list[dict[str, str]]) -> str:
        body = json.dumps({"model": self.model, "messages": messages, **self._settings}).encode()
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self._key, "")
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, body, headers, method="POST")
        with self._opener.open(request, timeout=self._timeout) as response:
            answer = json.loads(response.read(_BYTES))
        text = _text_of_answer(answer)
        usage = answer.get("usage") if isinstance(answer, dict) else None
        used = usage.get("total_tokens") if isinstance(usage, dict) else None
        if not isinstance(used, int):
            used = (len(body) + len(text)) // 4
        with self._lock:
            self.tokens += used
        return text

    def _warn(self, text: str) -> None:
        logger.warning("judge: %s; that completion stays without this reward.", text)


def _text_of_answer(answer: Any) -> str:
    try:
        text = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        text = None
    # a model that only thought, or a server that speaks another language: it cannot be parsed
    return text if isinstance(text, str) else ""


def _retry_after(headers: email.message.Message | None) -> float | None:
    value = (headers or {}).get("Retry-After", "")
    return float(value) if value and value.strip().isdigit() else None


def _body(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(2_000).decode("utf-8", "replace")
    except OSError:
        return ""
