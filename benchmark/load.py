"""Load on loopback: a two-stage server against one of the plain backbone, both on ONNX Runtime, by the same requests.

cfvit export deit_tiny_imagenet FOLDER
python benchmark/load.py deit_tiny_imagenet FOLDER PHOTOS [--server-cpu 0]

eta is set so that the given share of the photos is hard. In each round the servers are measured in turn: answers per
second and CPU time of the server per answer with clients that wait for their answers (saturation), and then the times
of requests that come at random at half of that rate. Ratios to the plain server are taken within a round; printed are
their medians. On a machine with other work, only the CPU time means something.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import median, quantiles
from types import SimpleNamespace
from typing import Any

import cyclopts
import httpx
import torch
from torch import Tensor

from cfvit import Predictor, load
from cfvit.deploy import Settings
from cfvit.deploy.server import create_app, serve
from cfvit.inference.engines.exported import open_graph, read_exported

QUEUES = {  # options of the two-stage servers
    "two queues": ["--coarse-batch", "8", "--fine-batch", "4", "--fine-wait", "20"],
    "one queue": [
        "--coarse-batch",
        "8",
        "--fine-batch",
        "8",
        "--fine-wait",
        "0",
    ],  # a batch's hard images go on at once
}
app = cyclopts.App()


class PlainEngine:
    """The plain backbone in the coarse stage's place; at eta 0 there is no other."""

    def __init__(self, folder: Path) -> None:
        self.model, self.weight = read_exported(folder), torch.empty(0)
        self._run = open_graph(folder, "plain", "onnx", torch.get_num_threads())

    def coarse(self, images: Tensor) -> tuple[Any, Tensor]:
        logits = torch.from_numpy(self._run({"images": images.numpy()})["logits"])
        return SimpleNamespace(logits=logits), self.model.exit.coarse(logits)

    def fine(self, images: Tensor, state: Any) -> tuple[Tensor, Tensor]:
        return state.logits, self.model.exit.coarse(state.logits)


@app.command
def plain(folder: Path, /) -> None:
    """Serves the plain backbone of a folder; the measurement starts this."""
    serve(create_app(Predictor(PlainEngine(folder), 0.0), Settings(name="model")), "127.0.0.1", 0)


def start(cpu: int | None, *command: str | Path) -> tuple[subprocess.Popen[Any], str]:
    """A server's process and address."""
    if cpu is not None:
        command = ("taskset", "-c", str(cpu), *command)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stderr is not None
    port = json.loads(process.stderr.readline())["port"]
    subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)  # the log must not fill its pipe
    return process, f"http://127.0.0.1:{port}"


def connected(address: str) -> httpx.AsyncClient:
    """A client with as many connections as it needs."""
    return httpx.AsyncClient(base_url=address, timeout=60, limits=httpx.Limits(max_connections=None))


def cpu_seconds(process: subprocess.Popen[Any]) -> float:
    """CPU time that a process has taken; Linux alone tells."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def saturation(address: str, photos: list[bytes], clients: int, seconds: float) -> tuple[int, float]:
    """Answers, and seconds, for clients that send the next photo when they have the answer."""
    done, start = 0, time.monotonic()

    async def client(seed: int) -> None:
        nonlocal done
        choose = random.Random(seed)
        while time.monotonic() < start + seconds:
            (await http.post("/predict", content=choose.choice(photos))).raise_for_status()
            done += 1

    async with connected(address) as http:
        await asyncio.gather(*map(client, range(clients)))
    return done, time.monotonic() - start


async def times(address: str, photos: list[bytes], rate: float, seconds: float) -> tuple[float, float, float]:
    """p50, p95 and p99, in milliseconds, of requests that come independently of each other at so many per second."""
    choose, taken = random.Random(0), []

    async def request() -> None:
        start = time.monotonic()
        (await http.post("/predict", content=choose.choice(photos))).raise_for_status()
        taken.append(1e3 * (time.monotonic() - start))

    end = time.monotonic() + seconds
    async with connected(address) as http, asyncio.TaskGroup() as group:
        while time.monotonic() < end:
            group.create_task(request())
            await asyncio.sleep(choose.expovariate(rate))
    cuts = quantiles(taken, n=100)
    return cuts[49], cuts[94], cuts[98]


@app.default
def measure(
    model: str,
    folder: Path,
    photos: Path,
    /,
    *,
    hard: float = 0.24,
    clients: int = 16,
    seconds: float = 10,
    rounds: int = 5,
    server_cpu: int | None = None,
) -> None:
    """Measures the servers and prints a table."""
    files = [file.read_bytes() for file in sorted(photos.rglob("*")) if file.is_file()]
    if not (folder / "plain.onnx").exists():
        network = load(model)
        batch = {0: torch.export.Dim("batch", min=1)}
        given: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"], "dynamic_shapes": (batch,)}
        images = torch.zeros(2, 3, *network.image_size)
        torch.onnx.export(
            network.backbone.eval(), (images,), folder / "plain.onnx", dynamo=True, verbose=False, **given
        )
    common = ("--model", folder, "--name", "model", "--port", "0", "--allow-parameters")
    servers = {"plain": start(server_cpu, sys.executable, __file__, "plain", folder)}
    servers |= {
        name: start(server_cpu, sys.executable, "-m", "cfvit", "serve", *common, *options)
        for name, options in QUEUES.items()
    }
    try:
        address = servers["one queue"][1]
        sure = [
            httpx.post(f"{address}/explain", content=file, timeout=60).json()["coarse_confidence"] for file in files
        ]
        eta = sorted(sure)[round(hard * len(sure))]
        for name in QUEUES:
            httpx.put(f"{servers[name][1]}/v2/models/model/parameters", json={"eta": eta}).raise_for_status()
        figures: dict[str, list[tuple[float, ...]]] = {name: [] for name in servers}
        for number in range(rounds):
            for name, (process, address) in servers.items():
                before = cpu_seconds(process)
                count, taken = asyncio.run(saturation(address, files, clients, seconds))
                own = (count / taken, 1e3 * (cpu_seconds(process) - before) / count)
                figures[name].append((*own, *asyncio.run(times(address, files, own[0] / 2, seconds))))
                print(number, name, *(f"{value:.1f}" for value in figures[name][-1]), file=sys.stderr)
    finally:
        for process, _ in servers.values():
            process.terminate()
    print("| times plain | answers/s | CPU time of an answer | p50 | p95 | p99 |\n|---|---|---|---|---|---|")
    for name in figures:
        pairs = zip(figures[name], figures["plain"], strict=True)
        ratios = [[own / other for own, other in zip(*pair, strict=True)] for pair in pairs]
        print(f"| {name} |", " | ".join(f"{median(column):.2f}" for column in zip(*ratios, strict=True)), "|")


if __name__ == "__main__":
    app()
