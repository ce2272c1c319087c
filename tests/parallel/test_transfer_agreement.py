"""Both sides of a weight transfer, in processes of their own, find out at once that they were started with different specifications."""

import re
import time
from dataclasses import replace

import pytest
import torch

import megatron_aspo
from megatron_aspo.common.network import reserved_port
from megatron_aspo.rollout.engine_layout import EngineSizes
from megatron_aspo.rollout.transfer_spec import TransferSpec
from megatron_aspo.sync.endpoints import WeightReceiver, WeightSender
from megatron_aspo.sync.group import TransferError, stateless_group
from megatron_aspo.weights.layout import ModelDims, ParallelSizes

pytestmark = pytest.mark.long

HOST, TIMEOUT_S = "127.0.0.1", 60.0
DIMS = ModelDims(layers=2, hidden=8, heads=2, kv_heads=2, head_dim=4, ffn=8, vocab=64, tied=True, qkv_bias=True)
SPEC = TransferSpec("Qwen2ForCausalLM", DIMS, ParallelSizes(pipeline=2), EngineSizes(engines=2), "bfloat16", 1 << 9)


def connect(rank: int, meeting: str, port: int, sides: tuple[TransferSpec, TransferSpec], version: str, terms: bool) -> tuple[str, float]:
    """Connect as a training rank or as an engine worker would; return what was raised, and after how many seconds.

    sides: the specification of the training ranks and that of the engines, whose package has this version.
    """
    spec = sides[rank >= sides[0].training.world]
    if rank >= sides[0].training.world and version:
        megatron_aspo.rollout.transfer_spec.__version__ = version
    started, error = time.monotonic(), ""
    try:
        agreed = spec.terms() if terms else None
        group = stateless_group(HOST, port, rank, spec.world, TIMEOUT_S, names=spec.rank_name, terms=agreed)
        end = WeightSender if rank < spec.training.world else WeightReceiver
        end(spec.schedule(rank, group.hosts), group, torch.device("cpu"))
    except TransferError as raised:
        error = str(raised)
    finally:
        megatron_aspo.rollout.transfer_spec.__version__ = megatron_aspo.__version__
    return error, time.monotonic() - started


def connect_all(pools, engines: TransferSpec, version: str = "", terms: bool = True) -> list[str]:
    """Return what each of four processes raised, none of them after a timeout."""
    with reserved_port(HOST) as port:
        results = pools(4).run(connect, port, (SPEC, engines), version, terms)
    assert all(seconds < TIMEOUT_S / 2 for _, seconds in results)
    return [error for error, _ in results]


def test_sides_with_the_same_specification_connect(pools):
    assert connect_all(pools, SPEC) == [""] * 4


@pytest.mark.parametrize(
    ("engines", "version", "named"),
    [
        (replace(SPEC, dtype="float32"), "", "dtype is bfloat16 there and float32 here"),
        (replace(SPEC, dims=replace(DIMS, layers=4)), "", "dims.layers is 2 there and 4 here"),
        (replace(SPEC, bucket_bytes=1 << 10), "", "bucket_bytes is 512 there and 1024 here"),
        (SPEC, "0.0.1", f"megatron_aspo is {megatron_aspo.__version__} there and 0.0.1 here"),
        # Another number of ranks: one side would wait for ranks that the other does not know.
        (replace(SPEC, engines=EngineSizes(engines=3)), "", "engines.engines is 2 there and 3 here"),
    ],
    ids=["dtype", "layers", "bucket", "version", "world"],
)
def test_a_different_specification_is_named_with_the_side_on_every_rank(pools, engines, version, named):
    errors = connect_all(pools, engines, version)
    world = engines.world
    for error in errors:
        assert error.startswith("training rank 0 and engine ") and f"of {world} of the group at {HOST}:" in error
        assert named in error and "start both sides from the same recipe" in error


def test_plans_that_differ_under_one_specification_are_named_by_their_digest(pools):
    """As when the nodes derive the plan by different code; here the specifications are not compared."""
    errors = connect_all(pools, replace(SPEC, bucket_bytes=1 << 10), terms=False)
    ends = r"(training rank|engine) \d and (training rank|engine) \d of the group at"
    expected = rf"{ends} .* have derived different plans .*SHA-256 \w{{12}} here, \w{{12}} there"
    assert sum(1 for error in errors if re.match(expected, error)) >= 2, errors
