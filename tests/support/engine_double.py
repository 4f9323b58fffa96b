"""A server with the routes of vLLM and SGLang, over a tiny model in this process. Its completions
come from `generate`, its log-probs from one plain forward: none of our samplers' code."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


class Engine:
    """The engine behind the routes.

    Attributes:
        calls: the routes that were asked, in order.
        broken: statuses to answer with first, one for each request to a sampling route.
        deaf: it says that it has loaded new weights, and has not.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.calls: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.broken: list[int] = []
        self.deaf = False
        self.lock = threading.Lock()

    @torch.no_grad()
    def sample(self, prompt: list[int], asked: dict[str, Any]) -> list[tuple[list[int], Any]]:
        torch.manual_seed(asked["seed"])
        most = asked["max_tokens"]
        ids = torch.tensor([prompt] * asked["n"])
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            max_new_tokens=most,
            temperature=asked["temperature"],
            top_k=asked.get("top_k", 0),
            pad_token_id=0,
            eos_token_id=asked["stop_token_ids"],
        )
        found = []
        for row in out.tolist():
            tokens = row[len(prompt) :]
            ends = [i for i, t in enumerate(tokens) if t in asked["stop_token_ids"]]
            tokens = tokens[: ends[0] + 1] if ends else tokens
            z = self.model(torch.tensor([prompt + tokens])).logits[0] / asked["temperature"]
            z = z.double().log_softmax(-1)[len(prompt) - 1 : -1]
            values = z.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
            found.append((tokens, values))
        return found

    def load(self, folder: str) -> None:
        assert (Path(folder) / "config.json").exists()
        if not self.deaf:
            self.model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def answer(self, route: str, body: dict[str, Any]) -> Any:
        self.calls.append(route)
        self.bodies.append(body)
        if route == "/v1/models":
            return {"data": [{"id": "tiny"}]}
        if route == "/v1/completions":
            rows = self.sample(body["prompt"], body)
            choices = [
                {
                    "index": i,
                    "token_ids": tokens,
                    "logprobs": {"token_logprobs": values},
                    "finish_reason": "stop",
                }
                for i, (tokens, values) in enumerate(rows)
            ]
            return {"choices": choices[::-1]}
        if route == "/collective_rpc":
            assert body["method"] == "reload_weights"
            self.load(body["kwargs"]["weights_path"])
            return {"results": [None]}
        if route == "/generate":
            out = []
            for prompt, given in zip(body["input_ids"], body["sampling_params"], strict=True):
                asked = {**given, "seed": given["sampling_seed"]}
                asked["max_tokens"] = given["max_new_tokens"]
                for tokens, values in self.sample(prompt, asked):
                    pairs = [[v, t, None] for t, v in zip(tokens, values, strict=True)]
                    out.append({"meta_info": {"output_token_logprobs": pairs}})
            return out
        if route == "/update_weights_from_disk":
            self.load(body["model_path"])
            return {"success": True, "message": ""}
        return None


class _Handler(BaseHTTPRequestHandler):
    def _reply(self, body: dict[str, Any]) -> None:
        engine: Engine = self.server.engine
        with engine.lock:
            sampling = self.path in ("/v1/completions", "/generate")
            status = engine.broken.pop(0) if engine.broken and sampling else 200
            text = "" if status != 200 else json.dumps(engine.answer(self.path, body))
        if status == 0:
            # a server that dies: the connection breaks
            self.close_connection = True
            return
        data = (text if text != "null" else "").encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self._reply({})

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self._reply(json.loads(self.rfile.read(length) or b"{}"))

    def log_message(self, *_: Any) -> None:
        pass


class Served:
    """`with Served(engine) as url`."""

    def __init__(self, engine: Engine) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.server.engine = engine
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> str:
        self.thread.start()
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()
