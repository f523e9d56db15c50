"""The process of a batch's engine: `python -m server.engine_host`, with vLLM's own flags.

vLLM's API server, whole, with two differences. An engine on one core computes in the server's own
process, as `LLM.generate` does, where it would otherwise share that core with a process of its own
and pay for every step's way there and back. And `POST /batch/lines` takes many requests in one
call: they go straight to vLLM's own serving layer, so that a line can be all that a request can,
and costs none of HTTP's.

    {"id": 7, "path": "/v1/completions", "body": {…}}       a line of what is asked
    {"id": 7, "status": 200, "body": {…}}                   a line of the answer, in any order

With `server.engine_adapters` the only module that imports vLLM. Knows nothing of experts, of files,
or of who asks.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any, NoReturn

import msgspec

from server.engine_door import App, Message, Receive, Send

LINES_PATH = "/batch/lines"
ONE_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"
"""Where this environment variable is 0, the engine computes in the server's process."""

GROUPED = "server.engine_adapters.GroupedAdapters"
"""Import path of what computes LoRA on a CPU."""
ENDED = b""
"""In place of an answer: the engine has died."""

Outcome = tuple[int, bytes]
"""Status and JSON."""
Handler = Callable[[Mapping[str, Any]], Awaitable[Outcome]]


class EngineEndedError(Exception):
    """The engine has died: what it was asked is to be asked elsewhere, and is nobody's fault."""


class AskedLine(msgspec.Struct):
    """One request of a call."""

    id: int
    path: str
    body: dict[str, Any]


_LINE = msgspec.json.Decoder(AskedLine)


class BatchLines:
    """The middleware that answers `POST /batch/lines`; all else goes on to the application."""

    def __init__(self, app: App, handlers: Mapping[str, Handler] | None = None) -> None:
        """Stand before `app`.

        Args:
            app: the API server.
            handlers: by path; none: vLLM's own, of the application's state.
        """
        self._app = app
        self._handlers = handlers

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one call, or let the application answer it."""
        if scope["type"] != "http" or scope["path"] != LINES_PATH or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        lines = await _read_lines(receive)
        if lines is None:
            await _start(send, HTTPStatus.BAD_REQUEST)
            body = refusal(HTTPStatus.BAD_REQUEST, "a line is not {'id', 'path', 'body'}")
            await send({"type": "http.response.body", "body": body})
            return
        if self._handlers is None:
            self._handlers = vllm_handlers(scope["app"].state)
        await _start(send, HTTPStatus.OK)
        await _answer(lines, self._handlers, receive, send)


async def _answer(
    lines: list[AskedLine], handlers: Mapping[str, Handler], receive: Receive, send: Send
) -> None:
    """Begin all lines in their order, send each answer when it is there; end with the client."""
    answered: asyncio.Queue[bytes] = asyncio.Queue()

    async def one(line: AskedLine) -> None:
        try:
            status, body = await _ask(line, handlers)
        except EngineEndedError:
            answered.put_nowait(ENDED)
            return
        answered.put_nowait(b'{"id":%d,"status":%d,"body":%s}\n' % (line.id, status, body))

    async def hang_up() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(one(line)) for line in lines]
    gone = asyncio.create_task(hang_up())
    left = len(tasks)
    try:
        while left:
            more = asyncio.create_task(answered.get())
            await asyncio.wait({more, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not more.done():
                more.cancel()
                return
            found = [more.result()]
            while not answered.empty():
                found.append(answered.get_nowait())
            if ENDED in found:
                return  # an answer that breaks off is what the caller understands
            left -= len(found)
            body = b"".join(found)
            await send({"type": "http.response.body", "body": body, "more_body": bool(left)})
        if not lines:
            await send({"type": "http.response.body", "body": b""})
    finally:
        for task in (*tasks, gone):
            task.cancel()
        await asyncio.gather(*tasks, gone, return_exceptions=True)


async def _ask(line: AskedLine, handlers: Mapping[str, Handler]) -> Outcome:
    handler = handlers.get(line.path)
    if handler is None:
        reason = f"a batch cannot ask {line.path[:100]!r}"
        return HTTPStatus.NOT_FOUND, refusal(HTTPStatus.NOT_FOUND, reason)
    if line.body.get("stream"):
        reason = "'stream' is not possible in a batch"
        return HTTPStatus.BAD_REQUEST, refusal(HTTPStatus.BAD_REQUEST, reason)
    return await handler(line.body)


def refusal(status: int, message: str) -> bytes:
    """An error in OpenAI's shape."""
    kind = HTTPStatus(status).phrase.replace(" ", "")
    error = {"message": message, "type": f"{kind}Error", "param": None, "code": int(status)}
    return msgspec.json.encode({"error": error})


def vllm_handlers(state: Any) -> dict[str, Handler]:
    """vLLM's serving layer, by path."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    chat, completion = state.openai_serving_chat, state.openai_serving_completion
    engine = state.engine_client
    return {
        "/v1/chat/completions": _served(ChatCompletionRequest, chat.create_chat_completion, engine),
        "/v1/completions": _served(CompletionRequest, completion.create_completion, engine),
    }


def _served(kind: Any, create: Callable[[Any], Awaitable[Any]], engine: Any) -> Handler:
    """A handler that answers as vLLM's own route does, errors too.

    It raises `EngineEndedError` where there is no engine any more to answer.
    """
    from pydantic import ValidationError
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

    async def handle(body: Mapping[str, Any]) -> Outcome:
        try:
            answer = await create(kind.model_validate(body))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            reason = f"{where}: {first['msg']}" if where else str(first["msg"])
            return HTTPStatus.BAD_REQUEST, refusal(HTTPStatus.BAD_REQUEST, reason)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this line's answer
            if engine.errored:
                raise EngineEndedError from None
            answer = create_error_response(error)
        if isinstance(answer, ErrorResponse):
            return int(answer.error.code), answer.model_dump_json().encode()
        return HTTPStatus.OK, answer.model_dump_json().encode()

    return handle


async def _read_lines(receive: Receive) -> list[AskedLine] | None:
    """All lines of a call; none if one of them is not what it should be."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            break
    try:
        return [_LINE.decode(raw) for raw in b"".join(parts).split(b"\n") if raw.strip()]
    except (msgspec.DecodeError, RecursionError):
        return None


async def _start(send: Send, status: int) -> None:
    headers = [(b"content-type", b"application/x-ndjson")]
    await send({"type": "http.response.start", "status": status, "headers": headers})


def compute_in_process() -> None:
    """Have vLLM's asynchronous engine step in this process, between what the event loop does."""
    from vllm.v1.engine.core_client import EngineCoreClient, InprocClient

    class Stepping(InprocClient):
        """An engine core that is stepped by whoever waits for its output."""

        def __init__(self, vllm_config: Any, executor_class: Any, log_stats: bool) -> None:
            super().__init__(vllm_config, executor_class, log_stats)
            self.resources = SimpleNamespace(engine_dead=False)
            self.engine_ranks_managed = [0]
            self._asked = asyncio.Event()

        async def get_output_async(self) -> Any:
            while not self.engine_core.scheduler.has_requests():
                self._asked.clear()
                await self._asked.wait()
            await asyncio.sleep(0)  # requests come in and answers go out between two steps
            try:
                return self.get_output()
            except Exception:
                self.resources.engine_dead = True
                raise

        async def add_request_async(self, request: Any) -> None:
            self.add_request(request)
            self._asked.set()

        def shutdown(self, timeout: float | None = None) -> None:
            """Take the engine down; told to end, vLLM asks for it from another thread than that of
            the event loop, which may be in the middle of a step."""
            if threading.current_thread() is not threading.main_thread():
                end_at_once()
            super().shutdown(timeout)

        async def abort_requests_async(self, request_ids: list[str]) -> None:
            self.abort_requests(request_ids)

    for name in dir(EngineCoreClient):
        now = getattr(InprocClient, name.removesuffix("_async"), None)
        if name.endswith("_async") and name not in vars(Stepping) and now is not None:
            setattr(Stepping, name, _at_once(now))

    def make(*, vllm_config: Any, executor_class: Any, log_stats: bool, **_: Any) -> Any:
        return Stepping(vllm_config, executor_class, log_stats)

    EngineCoreClient.make_async_mp_client = staticmethod(make)  # type: ignore[method-assign]


def end_at_once() -> NoReturn:
    """End this process as it is: it holds nothing that the system does not take back.

    To take an engine apart takes seconds and spoils the step that runs beside it. What was asked
    breaks off, and that is what a caller understands.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


def group_adapters() -> None:
    """Have an engine on a CPU compute LoRA by expert."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        setattr(current_platform, "get_punica_wrapper", lambda: GROUPED)  # noqa: B010 - a method


def _at_once(call: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    """What takes no time worth waiting for, as something to be awaited."""

    async def called(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    return called


def main() -> None:
    """Serve until told to end."""
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    if os.environ.get(ONE_PROCESS) == "0":
        compute_in_process()
        group_adapters()
    serve()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
