"""Compare weight sync with its lower bounds and with the common way: .venv/bin/python tools/bench/bench_sync.py [--rounds 5]

A model of two pipeline stages is sent to two engines of this machine, alternately in two ways that install the weights alike:
- as in a run: from every rank straight to the workers, through shared memory;
- the common way: rank 0 gathers whole tensors and sends them to every engine over a socket (gloo).
Then without engines: two processes receive the same and discard it, alternating with a copy of as many bytes in each.

The last line is one JSON object, medians of rounds:
- `bytes_over_bound`: bytes that ranks sent over the minimum of any plan;
- `transport_over_memcpy`: receiving without installing, over copying;
- `total_over_gather`: both engines updated, over the common way;
- `extra_over_bucket`: peak memory that an engine took beyond what it had before, with its share of the senders' shared memory, over 2
  buckets and its largest layer;
- the seconds behind these ratios; `installation_seconds` is the part of the total that is not transport.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))

from megatron_aspo.common.network import reserved_port
from megatron_aspo.hf.model import read_model
from megatron_aspo.rollout.engine_layout import EngineHoldings, EngineSizes
from megatron_aspo.rollout.engine_settings import KEEP_FREED_MEMORY
from megatron_aspo.rollout.options import RolloutOptions
from megatron_aspo.rollout.transfer_spec import TransferSpec
from megatron_aspo.sync.group import stateless_group
from megatron_aspo.sync.plan import count_least_traffic
from megatron_aspo.sync.schedule import node_map
from megatron_aspo.weights.families import layout, tensor_shapes
from megatron_aspo.weights.holdings import TrainingHoldings
from megatron_aspo.weights.layout import ParallelSizes, slices

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
ELSEWHERE = "another machine"
TIMEOUT_S = 120.0
DTYPE = "bfloat16"
STAGES = ParallelSizes(pipeline=2)


@dataclass
class Process:
    """A process of the benchmark that answers commands."""

    pipe: multiprocessing.connection.Connection

    @classmethod
    def start(cls, target: Callable, *arguments) -> "Process":
        here, there = multiprocessing.Pipe()
        multiprocessing.get_context("spawn").Process(target=target, args=(*arguments, there), daemon=True).start()
        return cls(here)

    def ask(self, *command) -> None:
        self.pipe.send(command)

    def answer(self):
        return self.pipe.recv()


def answer(pipe, commands: dict[str, Callable]) -> None:
    """Answer commands until the benchmark ends."""
    with contextlib.suppress(EOFError):
        while True:
            command, *arguments = pipe.recv()
            pipe.send(commands[command](*arguments))


def training_rank(rank: int, model: Path, spec: TransferSpec, meeting: int, pipe) -> None:
    """Hold a pipeline stage's weights, and send them in both ways."""
    import torch
    import torch.distributed as dist

    from megatron_aspo.hf.tensor_files import TensorReader
    from megatron_aspo.hf.tensor_meta import TensorMeta
    from megatron_aspo.hf.transfer import Gather, load
    from megatron_aspo.sync.endpoints import LocalTensors, WeightSender

    torch.set_num_threads(1)
    described = read_model(model)
    layouts = {r: layout(described.architecture, described.dims, STAGES, STAGES.coordinates(r)) for r in range(STAGES.world)}
    held = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in layouts[rank].parameter_shapes.items()}
    load(layouts[rank], held, TensorReader(described))
    dist.init_process_group("gloo", init_method=f"tcp://{HOST}:{meeting}", rank=rank, world_size=STAGES.world)
    single = replace(spec, training=ParallelSizes())
    senders: dict[str, WeightSender] = {}

    def connect(way: str, port: int) -> None:
        senders.clear()
        if way == "gather" and rank:
            return
        chosen, place = (single, ELSEWHERE) if way == "gather" else (spec, None)
        group = stateless_group(HOST, port, rank, chosen.world, TIMEOUT_S, own_host=place, names=chosen.rank_name, terms=chosen.terms())
        senders[way] = WeightSender(chosen.schedule(rank, group.hosts), group, torch.device("cpu"))

    def send(version: int) -> int:
        return senders["ours"].send_version(LocalTensors(layouts[rank], held), version, False)

    def gather(version: int) -> int:
        single_order = TrainingHoldings(described.architecture, described.dims, ParallelSizes()).in_turns()
        full = Gather(layouts, rank, held).whole([TensorMeta(name, DTYPE, described.tensor_shapes[name]) for name in single_order])
        if rank:
            list(full)
            return 0
        received: dict[str, torch.Tensor] = {}

        def read(tensor: str, box) -> torch.Tensor:
            while tensor not in received:
                name, values = next(full)
                received[name] = values
            return received[tensor][slices(box)]

        return senders["gather"].send_version(read, version, False)

    answer(pipe, {"connect": connect, "ours": send, "gather": gather})


def receiving_worker(worker: int, spec: TransferSpec, pipe) -> None:
    """Receive and discard; copy as much."""
    import torch

    from megatron_aspo.sync.endpoints import WeightReceiver

    torch.set_num_threads(1)
    found: dict = {}

    def connect(port: int) -> int:
        rank = spec.training.world + worker
        group = stateless_group(HOST, port, rank, spec.world, TIMEOUT_S, names=spec.rank_name, terms=spec.terms())
        schedule = spec.schedule(rank, group.hosts)
        found["receiver"] = WeightReceiver(schedule, group, torch.device("cpu"))
        elements = sum(message.elements for bucket in schedule.buckets for message in bucket.receives)
        found["copy"] = [torch.ones(elements, dtype=torch.bfloat16) for _ in range(2)]
        return elements

    def receive(version: int) -> int:
        found["receiver"].begin_version(version, False)
        while found["receiver"].buckets_left:
            with found["receiver"].next_bucket():
                pass
        return version

    def memcpy() -> int:
        source, target = found["copy"]
        target.copy_(source)
        return target.nbytes

    answer(pipe, {"connect": connect, "receive": receive, "memcpy": memcpy})


def timed(work: Callable[[], object]) -> tuple[float, object]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def transport(spec: TransferSpec, ranks: list[Process], rounds: int) -> dict:
    """Return the seconds of receiving and of copying, without engines."""
    workers = [Process.start(receiving_worker, worker, spec) for worker in range(spec.engines.world)]
    with reserved_port(HOST) as port:
        for process, command in [
            *((rank, ("connect", "ours", port)) for rank in ranks),
            *((worker, ("connect", port)) for worker in workers),
        ]:
            process.ask(*command)
        for process in (*ranks, *workers):
            process.answer()

    def receive(version: int) -> None:
        for rank in ranks:
            rank.ask("ours", version)
        for worker in workers:
            worker.ask("receive", version)
        for process in (*ranks, *workers):
            process.answer()

    def copy() -> None:
        for worker in workers:
            worker.ask("memcpy")
        for worker in workers:
            worker.answer()

    seconds: dict[str, list[float]] = {"transport": [], "memcpy": []}
    for number in range(1, rounds + 2):
        for name, work in (("transport", lambda version=number: receive(version)), ("memcpy", copy)):
            taken, _ = timed(work)
            if number > 1:
                seconds[name].append(taken)
    return seconds


class Engines:
    """Two engines, updated in either way."""

    def __init__(self, directory: Path, spec: TransferSpec, ranks: list[Process]):
        from megatron_aspo.rollout.pool import EnginePool

        options = RolloutOptions(engines=spec.engines.engines, dtype=DTYPE, max_running_requests=8, threads=1)
        self.pool = EnginePool(str(directory), options, max_model_len=256)
        self._spec, self._ranks = spec, ranks
        self._cores = [
            next(known.pid for known in info.remains.processes if "EngineCore" in Path(f"/proc/{known.pid}/cmdline").read_text())
            for info in self.pool.start()
        ]
        self._version = 0

    def connect(self, way: str) -> None:
        spec = replace(self._spec, training=ParallelSizes()) if way == "gather" else self._spec
        with reserved_port(HOST) as port:
            joining = self.pool.connect(HOST, port, spec, TIMEOUT_S, apart=way == "gather")
            for rank in self._ranks:
                rank.ask("connect", way, port)
            for rank in self._ranks:
                rank.answer()
            joining.result(TIMEOUT_S)

    def update(self, way: str) -> int:
        """Return the bytes that ranks sent to engines."""
        self._version += 1
        receiving = self.pool.receive_weights(self._version, False)
        for rank in self._ranks:
            rank.ask(way, self._version)
        sent = sum(rank.answer() for rank in self._ranks)
        receiving.result(TIMEOUT_S)
        return sent

    def extra_bytes(self, work: Callable[[], object]) -> list[int]:
        """Return each engine process's peak memory during `work` beyond what it had, without what it shares with senders; bytes."""
        before = []
        for core in self._cores:
            Path(f"/proc/{core}/clear_refs").write_text("5")  # resets the peak
            before.append(_memory(core, "VmRSS") - _memory(core, "RssShmem"))
        work()
        # Shared memory stays mapped, and so is part of the peak.
        peaks = [_memory(core, "VmHWM") - _memory(core, "RssShmem") for core in self._cores]
        return [peak - had for peak, had in zip(peaks, before, strict=True)]


def _memory(pid: int, key: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def shared_bytes() -> int:
    """Return the bytes that the benchmark's own processes share with engines."""
    links = [link for child in psutil.Process().children() for link in Path(f"/proc/{child.pid}/fd").iterdir()]
    found = [link.stat() for link in links if "memfd:megatron_aspo" in os.readlink(link)]
    return sum({status.st_ino: status.st_size for status in found}.values())


def largest_layer(shapes: dict[str, tuple[int, ...]]) -> int:
    """Return the elements of vLLM's largest layer; stacked parameters are one layer."""
    import math

    layers: dict[str, int] = {}
    for name, shape in shapes.items():
        stacked = name
        for part, whole in (("q_proj", "qkv"), ("k_proj", "qkv"), ("v_proj", "qkv"), ("gate_proj", "gate_up"), ("up_proj", "gate_up")):
            stacked = stacked.replace(f".{part}.", f".{whole}.")
        layers[stacked] = layers.get(stacked, 0) + math.prod(shape)
    return max(layers.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models/smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bucket-mib", type=int, default=32)
    parsed = parser.parse_args()
    os.environ |= KEEP_FREED_MEMORY  # as in engines
    import torch

    from megatron_aspo.commands.verify_sync import save_random_model
    from megatron_aspo.runtime.cluster import open_cluster

    described = read_model(parsed.model)
    spec = TransferSpec(described.architecture, described.dims, STAGES, EngineSizes(engines=2), DTYPE, parsed.bucket_mib << 20)
    schedule = spec.schedule(STAGES.world, [""] * spec.world)
    bucket = max(2 * sum(message.elements for message in bucket.receives) for bucket in schedule.buckets)
    layer = 2 * largest_layer(tensor_shapes(described.architecture, described.dims))
    source = TrainingHoldings(described.architecture, described.dims, STAGES)
    target = EngineHoldings(described.architecture, described.dims, spec.engines)
    least = 2 * count_least_traffic(source.in_turns(), source, target, node_map([""] * spec.world))
    with reserved_port(HOST) as meeting:
        ranks = [Process.start(training_rank, rank, parsed.model, spec, meeting) for rank in range(STAGES.world)]
        moved = transport(spec, ranks, parsed.rounds)
    cluster = open_cluster("", 8)
    seconds: dict[str, list[float]] = {"ours": [], "gather": []}
    with tempfile.TemporaryDirectory() as other:
        save_random_model(parsed.model, Path(other))
        engines = Engines(Path(other), spec, ranks)
        try:
            engines.connect("ours")
            sent: list[int] = []
            own = statistics.mean(engines.extra_bytes(lambda: sent.append(engines.update("ours"))))
            extra = own + shared_bytes() / engines.pool.size
            for _ in range(parsed.rounds):
                for way in seconds:
                    engines.connect(way)
                    engines.update(way)  # the first update touches new memory
                    seconds[way].append(timed(lambda way=way: engines.update(way))[0])
        finally:
            engines.pool.shutdown()
            cluster.close()
    median = {name: statistics.median(values) for name, values in (moved | seconds).items()}
    ratio = {
        name: statistics.median(a / b for a, b in zip(*pair, strict=True))
        for name, pair in {"transport": (moved["transport"], moved["memcpy"]), "total": (seconds["ours"], seconds["gather"])}.items()
    }
    print(
        json.dumps(
            {
                "bytes_over_bound": sent[0] / least,
                "transport_over_memcpy": round(ratio["transport"], 3),
                "total_over_gather": round(ratio["total"], 3),
                "extra_over_bucket": round(extra / (2 * bucket + layer), 3),
                "total_seconds": round(median["ours"], 3),
                "gather_seconds": round(median["gather"], 3),
                "transport_seconds": round(median["transport"], 3),
                "memcpy_seconds": round(median["memcpy"], 3),
                "installation_seconds": round(median["ours"] - median["transport"], 3),
                "bytes": sent[0],
                "extra_bytes": round(extra),
                "of_which_shared_bytes": round(extra - own),
                "largest_bucket_bytes": bucket,
                "largest_layer_bytes": layer,
                "threads": torch.get_num_threads(),
            }
        )
    )


if __name__ == "__main__":
    main()
