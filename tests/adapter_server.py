"""A real server whose adapters are loaded and unloaded, and transformers' and peft's answers through each."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from serving import Server

PROMPT = [9, 40, 77, 21, 63, 112, 5, 90]
NUM_OUTPUT = 8


@dataclass
class Fleet:
    """A server; its adapters on disk; transformers' and peft's answers through each (and "tiny", the base model)."""

    server: Server
    root: Path
    expected: dict[str, list[int]]

    def post(self, path: str, body: dict[str, object]) -> tuple[int, str]:
        request = urllib.request.Request(
            f"{self.server.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def load(self, name: str, adapter: str, **options: object) -> tuple[int, str]:
        return self.post(
            "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(self.root / "adapters" / adapter)} | options
        )

    def unload(self, name: str) -> tuple[int, str]:
        return self.post("/v1/unload_lora_adapter", {"lora_name": name})

    def complete(self, model: str) -> tuple[int, str]:
        body = {"model": model, "prompt": PROMPT, "max_tokens": NUM_OUTPUT, "temperature": 0, "ignore_eos": True}
        return self.post("/v1/completions", body | {"skip_special_tokens": False})

    def answers_as(self, model: str, adapter: str) -> bool:
        status, body = self.complete(model)
        assert status == 200, body
        return bool(self.text_of(adapter) == json.loads(body)["choices"][0]["text"])

    def text_of(self, adapter: str) -> str:
        _, body = self.post("/detokenize", {"tokens": self.expected[adapter]})
        return str(json.loads(body)["prompt"])

    def models(self) -> list[str]:
        return [model["id"] for model in json.loads(self.server.get("/v1/models")[1])["data"]]
