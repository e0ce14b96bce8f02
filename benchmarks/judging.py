"""Seconds to judge 160 turns over a server that takes 0.2 s a reply: one request at a time against the default.

    PYTHONPATH=src python benchmarks/judging.py

The server is a process of its own on the loopback interface and answers every request after the latency, as many at
once as come. Both sides go through the real client, `judge.concurrency` alone differs; each turn is its own prompt.
The client, its connections and its store of replies are made anew for each side, within its time.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import socket
import tempfile
import time
from typing import Any

from aiohttp import web

from configuration import group
from prefscan.common.config import OpenAIJudge
from prefscan.common.errors import UserError, run
from prefscan.judging.judge import Prompt, load_judge

KEY_VARIABLE = "PREFSCAN_BENCHMARK_KEY"


def serve(listening: socket.socket, latency: float) -> None:
    async def complete(_: web.Request) -> web.Response:
        await asyncio.sleep(latency)
        message = {"role": "assistant", "content": "Rating: [[5]]"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        body = {"id": "c", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        return web.json_response(body)

    app = web.Application()
    app.router.add_post("/v1/chat/completions", complete)
    web.run_app(app, sock=listening, print=None)


def seconds(settings: OpenAIJudge, turns: int) -> float:
    """For all turns, none of which is in a store; raises UserError when one has no score."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        started = time.perf_counter()
        verdicts = dict(load_judge(settings).verdicts(Prompt("You judge.", f"Turn {i}.") for i in range(turns)))
        taken = time.perf_counter() - started
    if sum(verdict.score == 5 for verdict in verdicts.values()) != turns:
        raise UserError("a turn has no score; the benchmark's own server failed")
    return taken


def measure(turns: int, latency: float) -> dict[str, Any]:
    os.environ[KEY_VARIABLE] = "none"  # the server asks for none
    judge = group("judge", "gpt4")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        judge |= {"base_url": f"http://127.0.0.1:{listening.getsockname()[1]}/v1", "key_variable": KEY_VARIABLE}
        server = multiprocessing.Process(target=serve, args=(listening, latency), daemon=True)
        server.start()
        try:
            concurrent = OpenAIJudge.model_validate(judge)
            seconds(concurrent, 1)  # the server has started
            taken = seconds(concurrent, turns)
            alone = seconds(concurrent.model_copy(update={"concurrency": 1}), turns)
        finally:
            server.terminate()
            server.join()
    return {
        "turns": turns,
        "latency": latency,
        "concurrency": concurrent.concurrency,
        "seconds_one_at_a_time": alone,
        "seconds": taken,
        "ratio": alone / taken,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Judging over a slow server; the module's text says how.")
    parser.add_argument("--turns", type=int, default=160)
    parser.add_argument("--latency", type=float, default=0.2, help="seconds the server takes for a reply")
    options = parser.parse_args()
    print(json.dumps(measure(options.turns, options.latency), indent=2))


if __name__ == "__main__":
    run("judging", main)
