"""An engine that streams a token a second, for soaks: `python _slow.py --port N --interval S`.

Answers `/v1/completions` and `/v1/chat/completions` with as many events as `max_tokens` asks for;
`GET /open` tells how many streams run and how many connections are there. One process, asyncio's
own sockets: a thousand streams cost it next to nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json

HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


class Slow:
    """The server's state."""

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self.streams = 0
        self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"GET"):
                    facts = {"streams": self.streams, "connections": self.connections}
                    body = json.dumps(facts).encode()
                    writer.write(
                        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
                        b"content-length: %d\r\n\r\n%s" % (len(body), body)
                    )
                else:
                    body = await reader.readexactly(length_of(head))
                    self.streams += 1
                    try:
                        await self.stream(json.loads(body), writer)
                    finally:
                        self.streams -= 1
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has gone
        finally:
            self.connections -= 1
            writer.close()

    async def stream(self, asked: dict[str, object], writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        for number in range(int(str(asked["max_tokens"]))):
            choice = {"index": 0, "text": f"t{number} ", "finish_reason": None}
            event = {"id": "x", "object": "text_completion", "created": 1, "choices": [choice]}
            event["model"] = asked["model"]
            writer.write(chunk(b"data: " + json.dumps(event).encode() + b"\n\n"))
            await writer.drain()
            await asyncio.sleep(self.interval)
        writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def length_of(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


async def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--port", type=int, required=True)
    arguments.add_argument("--interval", type=float, default=1.0)
    options = arguments.parse_args()
    slow = Slow(options.interval)
    server = await asyncio.start_server(slow.serve, "127.0.0.1", options.port, backlog=4096)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
