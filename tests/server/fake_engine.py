"""A small HTTP server with the engine's routes, which echoes the adapter's name.

    python fake_engine.py PORT [--behaviour KEY=VALUE …]

The log-probabilities of a model are `logprob(model, position)`, so a test knows the right
fingerprint of every adapter; an adapter directory that holds a file `as.json` answers as the
adapter named in it, as one whose weights were swapped on disk would. As in vLLM a name that is
loaded cannot be loaded again, one that is not cannot be unloaded, a key in the environment guards
`/v1` alone, and unloading forgets no more than the name.

Behaviours: `die-at-start=1`, `hang=FILE` (health answers no more once there is FILE),
`mute=MODEL` (it generates no token), `die-after=SECONDS`, `slow-start=SECONDS`, `garble=MODEL` (its
log-probabilities come in a shape of their own), `deadly=NAME` (loading it ends the process),
`slow-load=SECONDS`, `stuck=NAME` (it cannot be unloaded), `stall=FILE` (it generates no more once
there is FILE, though it is well by its own word), `busy=1` (it computes tokens all the same, for
others).
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler

BASE = "fake-base"
MAX_MODEL_LEN = 128


def logprob(model: str, position: int) -> float:
    return -1.0 - (sum(model.encode()) % 97) / 10 - position / 100


class FakeEngine:
    def __init__(self, behaviour: dict[str, str]) -> None:
        self.behaviour = behaviour
        self.adapters: dict[str, str] = {}
        self.tokens = 0.0
        self.calls: list[str] = []
        """Loads and unloads, in order."""

    def app(self) -> web.Application:
        app = web.Application(middlewares=[_ask_for_key])
        app.add_routes(
            [
                web.get("/health", self.health),
                web.get("/version", self.version),
                web.get("/v1/models", self.models),
                web.post("/v1/load_lora_adapter", self.load),
                web.post("/v1/unload_lora_adapter", self.unload),
                web.post("/v1/completions", self.completions),
                web.get("/environment", self.environment),
                web.get("/calls", self.show_calls),
                web.get("/metrics", self.metrics),
            ]
        )
        return app

    async def health(self, _: web.Request) -> web.Response:
        if self._is_told_to("hang"):
            await asyncio.sleep(3600)
        return web.Response()

    def _is_told_to(self, misbehave: str) -> bool:
        return misbehave in self.behaviour and _exists(Path(self.behaviour[misbehave]))

    async def version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "fake"})

    async def environment(self, _: web.Request) -> web.Response:
        return web.json_response(dict(os.environ))

    async def metrics(self, _: web.Request) -> web.Response:
        if self.behaviour.get("busy"):
            self.tokens += 1
        return web.Response(
            text="# HELP vllm:iteration_tokens_total …\n"
            f'vllm:iteration_tokens_total_sum{{engine="0"}} {self.tokens}\n'
        )

    async def show_calls(self, _: web.Request) -> web.Response:
        return web.json_response({"calls": self.calls})

    async def models(self, _: web.Request) -> web.Response:
        data = [{"id": BASE, "max_model_len": MAX_MODEL_LEN}]
        data += [{"id": name, "max_model_len": None} for name in self.adapters]
        return web.json_response({"object": "list", "data": data})

    async def load(self, request: web.Request) -> web.Response:
        body = await request.json()
        name, directory = body["lora_name"], Path(body["lora_path"])
        self.calls.append(f"load {name}")
        if name == self.behaviour.get("deadly"):
            os._exit(4)
        if name in self.adapters:
            return _refuse(400, f"The lora adapter '{name}' has already been loaded.")
        await asyncio.sleep(float(self.behaviour.get("slow-load", "0")))
        if not _exists(directory):
            return _refuse(404, f"No adapter found for {body['lora_path']}")
        self.adapters[name] = _answers_as(directory) or name
        return web.Response(text="Success")

    async def unload(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        self.calls.append(f"unload {name}")
        if name == self.behaviour.get("stuck"):
            return _refuse(500, "it will not go")
        if name not in self.adapters:
            return _refuse(404, f"The lora adapter '{name}' cannot be found.")
        del self.adapters[name]
        return web.Response(text="Success")

    async def completions(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self._is_told_to("stall"):
            await asyncio.sleep(3600)
        self.tokens += 1
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


@web.middleware
async def _ask_for_key(request: web.Request, handler: Handler) -> web.StreamResponse:
    key = os.environ.get("VLLM_API_KEY")
    shown = request.headers.get("Authorization")
    if key and request.path.startswith("/v1") and shown != f"Bearer {key}":
        return web.json_response({"error": "Unauthorized"}, status=401)
    return await handler(request)


def _exists(path: Path) -> bool:
    return path.exists()


def _answers_as(directory: Path) -> str | None:
    swapped = directory / "as.json"
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
        FakeEngine(behaviour).app(),
        host="127.0.0.1",
        port=int(port),
        loop=loop,
        print=None,
        shutdown_timeout=0.1,
    )


if __name__ == "__main__":
    main()
