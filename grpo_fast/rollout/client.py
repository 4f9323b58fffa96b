"""JSON over HTTP to a sampling server: retried while it is busy or gone, then one clear end."""

from __future__ import annotations

import http.client
import json
import logging
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from grpo_fast.checks import fail

from .failure import SamplerFailed

logger = logging.getLogger(__name__)

# the server is starting, busy, or has an accident; every other status is the request's own fault
_TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_LONGEST_PAUSE = 30.0


class Client:
    """Requests to one server.

    Args:
        url: base address, such as http://127.0.0.1:8000.
        timeout: seconds for one answer; a window of long completions takes minutes.
        patience: seconds for which a server that is gone or busy is asked again, after 1, 2, 4, ...
            seconds, before the run ends.
        concurrency: requests at once; an engine schedules hundreds of its own.

    Raises:
        ValueError: an address that is no http or https address, a number out of range.
    """

    def __init__(
        self, url: str, *, timeout: float = 1800.0, patience: float = 300.0, concurrency: int = 64
    ) -> None:
        if not isinstance(url, str) or not url.startswith(("http://", "https://")):
            fail("sampler_url", "http://host:port or https://host:port", repr(url))
        self.url = url.rstrip("/")
        self.timeout, self.patience = timeout, patience
        self.concurrency = concurrency

    def ask(self, method: str, route: str, body: dict[str, Any] | None = None) -> Any:
        """The answer to one request, decoded; None where it is empty.

        Raises:
            SamplerFailed: no answer within the patience, or a refusal, with what the server said.
        """
        until, pause = time.monotonic() + self.patience, 1.0
        while True:
            try:
                return self._once(method, route, body)
            except urllib.error.HTTPError as error:
                said = " ".join(error.read(2000).decode("utf-8", "replace").split())
                reason = f"status {error.code}: {said[:400]}"
                if error.code not in _TRY_AGAIN:
                    raise SamplerFailed(f"{self.url}{route} refused: {reason}") from None
            # gone, broken off, too slow, or it speaks another language
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
            if time.monotonic() + pause > until:
                raise SamplerFailed(
                    f"{self.url}{route} gave no answer in {self.patience:g} s ({reason}). Is the "
                    "server running, and is sampler_url its address?"
                )
            logger.warning("%s%s: %s; asked again in %g s.", self.url, route, reason, pause)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def ask_all(self, method: str, route: str, bodies: list[dict[str, Any]]) -> list[Any]:
        """The answers to several requests, in order.

        Raises:
            SamplerFailed: one of them failed; those that wait are given up.
        """
        if len(bodies) == 1:
            return [self.ask(method, route, bodies[0])]
        with ThreadPoolExecutor(min(self.concurrency, max(1, len(bodies)))) as pool:
            futures = [pool.submit(self.ask, method, route, body) for body in bodies]
            try:
                return [future.result() for future in futures]
            except SamplerFailed:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _once(self, method: str, route: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + route, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            text = response.read()
        return json.loads(text) if text.strip() else None
