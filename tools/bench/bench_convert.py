"""Measure speed and memory of conversion: .venv/bin/python tools/bench/bench_convert.py [--gb 1] [--place DIR] [--rounds 5]

Model: Qwen2-0.5B's shape in bfloat16 (tied, vocabulary 151,936), random, with as many layers as make up the size.

Speed. One round times `load_file` + `save_file` of safetensors on the whole model, then each conversion, in one process; each result is the
median over the rounds. A conversion is timed as a user sees it: the source is verified (every file of a checkpoint is hashed), the target
is written, fsynced, read back and compared with the source, and every tensor is hashed. `save_file` neither fsyncs nor verifies:
`speed_over_safetensors` compares the slowest conversion with it, `speed_over_safetensors_and_fsync` with load, save and fsync. Pending
writes are flushed before each timing, and the source is in the page cache for all. `seconds_hashes_alone` is the time in which two threads
compute SHA-256 of each byte twice, of files and of tensors: a lower bound for any conversion.

Memory. Each conversion runs in a child process. Its memory is the peak of its anonymous memory (RssAnon in /proc/PID/status, read every
millisecond from outside), less the value after all imports and one tiny conversion. Pages of mapped files are left out: the kernel reclaims
them when it needs them. 2 is twice the largest tensor of the Hugging Face model; the bar allows one shard on top.

Both use checkpoints of this project. `torch_dist_over_ours` is the time of a conversion to or from `torch_dist` over the time of the same
one with our checkpoint at TP1, the larger of the two ratios. The last line is one JSON object.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_aspo.checkpoint.convert import convert, open_source
from megatron_aspo.checkpoint.manifest import sha256_of
from megatron_aspo.weights.layout import ParallelSizes

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 896, 4864, 14, 2, 64, 151_936

OURS: dict[str, tuple[str, str, int]] = {
    "hf_to_tp1": ("hf", "megatron", 1),
    "tp1_to_hf": ("tp1", "huggingface", 1),
    "hf_to_tp2": ("hf", "megatron", 2),
    "tp2_to_hf": ("tp2", "huggingface", 1),
}
"""Name → (source, format of the target, its tensor-parallel size)."""
CONVERSIONS = OURS | {"hf_to_dist": ("hf", "torch_dist", 1), "dist_to_hf": ("dist", "huggingface", 1)}


def write_model(directory: Path, layers: int, vocab: int = VOCAB) -> int:
    """Write a random model in one file; return the bytes of its largest tensor."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "max_position_embeddings": 32768,
        "num_attention_heads": HEADS,
        "num_hidden_layers": layers,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        "tie_word_embeddings": True,
        "vocab_size": vocab,
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (vocab, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_shapes().items()}
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return max(tensor.nbytes for tensor in tensors.values())


def layer_shapes() -> dict[str, tuple[int, ...]]:
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    return {
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
        **{f"self_attn.{part}_proj.weight": (rows, HIDDEN) for part, rows in (("q", q), ("k", kv), ("v", kv))},
        **{f"self_attn.{part}_proj.bias": (rows,) for part, rows in (("q", q), ("k", kv), ("v", kv))},
        "self_attn.o_proj.weight": (HIDDEN, q),
        "mlp.gate_proj.weight": (FFN, HIDDEN),
        "mlp.up_proj.weight": (FFN, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, FFN),
    }


def layers_for(gb: float) -> int:
    """Return the number of layers that make up the size beside the embedding, at least one."""
    layer = sum(2 * torch.Size(shape).numel() for shape in layer_shapes().values())
    return max(1, round((gb * 1e9 - 2 * VOCAB * HIDDEN) / layer))


def run_conversion(name: str, room: Path, target: Path) -> None:
    source, to, tensor = CONVERSIONS[name]
    convert(open_source(room / source), target, to=to, sizes=ParallelSizes(tensor))


def load_and_save(room: Path, target: Path, *, fsync: bool) -> None:
    target.mkdir()
    save_file(load_file(room / "hf" / "model.safetensors"), target / "model.safetensors", metadata={"format": "pt"})
    if fsync:
        with (target / "model.safetensors").open("rb") as file:
            os.fsync(file.fileno())


def hash_twice(room: Path, target: Path) -> None:
    target.mkdir()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(sha256_of, [room / "hf" / "model.safetensors"] * 2))


def timed(work: Callable[[Path], None], target: Path) -> float:
    """Return the seconds that `work` takes; its target is removed afterwards."""
    os.sync()
    start = time.perf_counter()
    work(target)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def measure_speed(room: Path, rounds: int) -> dict[str, float]:
    """Return the median seconds of each contestant."""
    contestants: dict[str, Callable[[Path], None]] = {
        "safetensors": lambda target: load_and_save(room, target, fsync=False),
        "safetensors_and_fsync": lambda target: load_and_save(room, target, fsync=True),
        "hashes_alone": lambda target: hash_twice(room, target),
        **{name: lambda target, name=name: run_conversion(name, room, target) for name in CONVERSIONS},
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name, work in contestants.items():
            seconds[name].append(timed(work, room / "target"))
        print(f"round {number + 1}: " + ", ".join(f"{name} {values[-1]:.2f} s" for name, values in seconds.items()), flush=True)
    return {name: statistics.median(values) for name, values in seconds.items()}


def anonymous_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0  # the process has just ended


def measure_memory(name: str, room: Path) -> int:
    """Return the peak of the anonymous memory, in bytes, that one conversion adds."""
    child = subprocess.Popen([sys.executable, __file__, "--child", name, "--place", room], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin and child.stdout
    child.stdout.readline()  # it is ready
    before = highest = anonymous_bytes(child.pid)
    child.stdin.close()
    while child.poll() is None:
        highest = max(highest, anonymous_bytes(child.pid))
        time.sleep(0.001)
    if child.returncode:
        raise SystemExit(f"the conversion {name} failed")
    shutil.rmtree(room / "target")
    return highest - before


def child(name: str, room: Path) -> None:
    """Run one conversion, after the parent has measured what the process holds without it."""
    with tempfile.TemporaryDirectory(dir=room) as small:
        write_model(Path(small, "hf"), 1, vocab=2)
        convert(open_source(Path(small, "hf")), Path(small, "tp1"), to="megatron", sizes=ParallelSizes())
        convert(open_source(Path(small, "tp1")), Path(small, "back"), to="huggingface", sizes=ParallelSizes())
    print("ready", flush=True)
    sys.stdin.read()
    run_conversion(name, room, room / "target")


def main() -> None:
    torch.set_num_threads(1)  # as the command does
    parser = argparse.ArgumentParser(description="Speed and memory of conversion, against safetensors alone.")
    parser.add_argument("--gb", type=float, default=1.0, help="size of the model (default 1)")
    parser.add_argument("--place", type=Path, help="directory on the disk to measure (default: the system's temporary directory)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds to take the median of (default 5)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.child:
        return child(parsed.child, parsed.place)
    with tempfile.TemporaryDirectory(prefix="bench_convert_", dir=parsed.place) as name:
        room = Path(name)
        largest = write_model(room / "hf", layers_for(parsed.gb))
        size = (room / "hf" / "model.safetensors").stat().st_size
        print(f"{size / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB, in {room}", flush=True)
        for made in ("tp1", "tp2", "dist"):
            run_conversion(f"hf_to_{made}", room, room / made)
        memory = {conversion: measure_memory(conversion, room) / largest for conversion in CONVERSIONS}
        print("peak / largest tensor: " + ", ".join(f"{conversion} {peak:.2f}" for conversion, peak in memory.items()), flush=True)
        seconds = measure_speed(room, parsed.rounds)
    speeds = {conversion: seconds["safetensors"] / seconds[conversion] for conversion in CONVERSIONS}
    slowest = min(OURS, key=lambda conversion: speeds[conversion])
    figures = {
        "speed_over_safetensors": speeds[slowest],
        "peak_over_largest_tensor": max(memory[name] for name in OURS),
        "torch_dist_over_ours": max(seconds["hf_to_dist"] / seconds["hf_to_tp1"], seconds["dist_to_hf"] / seconds["tp1_to_hf"]),
        "speed_over_safetensors_and_fsync": seconds["safetensors_and_fsync"] / seconds[slowest],
        "slowest": slowest,
        **{f"speed_{conversion}": speed for conversion, speed in speeds.items()},
        **{f"peak_{conversion}": peak for conversion, peak in memory.items()},
        **{f"seconds_{contestant}": value for contestant, value in seconds.items()},
        "gb": size / 1e9,
    }
    print(json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in figures.items()}))


if __name__ == "__main__":
    main()
