"""A small HTTP server with the engine's routes, which echoes the adapter's name.

    python fake_engine.py PORT [--behaviour KEY=VALUE …]

The log-probabilities of a model are `logprob(model, position)`, so a test knows the right
fingerprint of every adapter; an adapter directory that holds a file `as` answers as the adapter
named in it, as one whose weights were swapped on disk would.

Behaviours: `die-at-start=1`, `hang-after=SECONDS` (health answers no more), `mute=MODEL` (it
generates no token), `die-after=SECONDS`, `slow-start=SECONDS`, `garble=MODEL` (its
log-probabilities come in a shape of their own).
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

from aiohttp import web

BASE = "fake-base"
MAX_MODEL_LEN = 128


def logprob(model: str, position: int) -> float:
    return -1.0 - (sum(model.encode()) % 97) / 10 - position / 100


class FakeEngine:
    def __init__(self, behaviour: dict[str, str]) -> None:
        self.behaviour = behaviour
        self.born = time.monotonic()
        self.adapters: dict[str, str] = {}

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes(
            [
                web.get("/health", self.health),
                web.get("/version", self.version),
                web.get("/v1/models", self.models),
                web.post("/v1/load_lora_adapter", self.load),
                web.post("/v1/unload_lora_adapter", self.unload),
                web.post("/v1/completions", self.completions),
                web.get("/environment", self.environment),
            ]
        )
        return app

    async def health(self, _: web.Request) -> web.Response:
        hang_after = float(self.behaviour.get("hang-after", "inf"))
        if time.monotonic() - self.born > hang_after:
            await asyncio.sleep(3600)
        return web.Response()

    async def version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "fake"})

    async def environment(self, _: web.Request) -> web.Response:
        return web.json_response(dict(os.environ))

    async def models(self, _: web.Request) -> web.Response:
        data = [{"id": BASE, "max_model_len": MAX_MODEL_LEN}]
        data += [{"id": name, "max_model_len": None} for name in self.adapters]
        return web.json_response({"object": "list", "data": data})

    async def load(self, request: web.Request) -> web.Response:
        body = await request.json()
        directory = Path(body["lora_path"])
        if not _exists(directory):
            return _refuse(404, f"No adapter found for {body['lora_path']}")
        self.adapters[body["lora_name"]] = _answers_as(directory) or body["lora_name"]
        return web.Response(text="Success")

    async def unload(self, request: web.Request) -> web.Response:
        self.adapters.pop((await request.json())["lora_name"])
        return web.Response(text="Success")

    async def completions(self, request: web.Request) -> web.Response:
        body = await request.json()
        model, prompt = body["model"], body["prompt"]
        if model != BASE and model not in self.adapters:
            return _refuse(404, f"The model `{model}` does not exist.")
        choice: dict[str, object] = {"index": 0, "text": model, "finish_reason": "length"}
        if "prompt_logprobs" in body:
            answering = self.adapters.get(model, model)
            choice["prompt_logprobs"] = [None] + [
                {str(token): {"logprob": logprob(answering, place), "rank": 1}}
                for place, token in enumerate(prompt[1:], start=1)
            ]
            if self.behaviour.get("garble") == model:
                choice["prompt_logprobs"] = None
        generated = 0 if self.behaviour.get("mute") == model else 1
        return web.json_response(
            {"model": model, "choices": [choice], "usage": {"completion_tokens": generated}}
        )


def _exists(directory: Path) -> bool:
    return directory.is_dir()


def _answers_as(directory: Path) -> str | None:
    swapped = directory / "as"
    return swapped.read_text() if swapped.is_file() else None


def _refuse(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=status)


def main() -> None:
    port, *pairs = sys.argv[1:]
    behaviour = dict(pair.split("=", 1) for pair in pairs)
    if "die-at-start" in behaviour:
        sys.exit("RuntimeError: no memory left for the fake cache")
    time.sleep(float(behaviour.get("slow-start", "0")))
    loop = asyncio.new_event_loop()
    if "die-after" in behaviour:
        loop.call_later(float(behaviour["die-after"]), os._exit, 3)
    if os.fork() == 0:  # a child such as the engine core, deaf to its parent's end
        time.sleep(3600)
    web.run_app(
        FakeEngine(behaviour).app(), host="127.0.0.1", port=int(port), loop=loop, print=None
    )


if __name__ == "__main__":
    main()
