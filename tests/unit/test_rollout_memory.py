"""The key-value cache of an engine, by hand: how many tokens it holds, and the size that is proposed where these are too few."""

import math
import re

import pytest

from megatron_aspo.common.errors import UserError
from megatron_aspo.hf.model import HFModel, read_model
from megatron_aspo.rollout.engine_settings import GIB
from megatron_aspo.rollout.memory import cached_tokens, check_cache, choose_cache, worker_memory
from megatron_aspo.rollout.options import RolloutOptions
from tests.models import save_tiny

LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 32


@pytest.fixture
def model(tmp_path) -> HFModel:
    save_tiny("qwen3", tmp_path, num_hidden_layers=LAYERS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM)
    return read_model(tmp_path)


@pytest.mark.parametrize(("workers", "copies"), [(1, 1), (2, 1), (4, 2)])
@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_a_cache_holds_keys_and_values_of_each_layer_and_head(model, workers, copies, dtype, itemsize):
    """However many workers share it; of more workers than key-value heads, several keep the same head."""
    options = RolloutOptions(tensor_parallel=workers, dtype=dtype, kv_cache_gib=0.5)
    a_token = 2 * LAYERS * KV_HEADS * HEAD_DIM * itemsize
    assert cached_tokens(model, options) == GIB // 2 // (copies * a_token)


@pytest.mark.parametrize("workers", [1, 4])
def test_a_request_that_does_not_fit_is_refused_with_a_size_that_is_enough_and_not_twice_too_much(model, workers):
    options = RolloutOptions(tensor_parallel=workers, dtype="float32", kv_cache_gib=0.1)
    longest = 2_000_000
    with pytest.raises(
        UserError, match=r"kv_cache_gib=0\.1 holds the keys and values of [\d,]+ tokens, fewer than the 2,000,000"
    ) as refused:
        check_cache(model, options, longest)
    enough = float(re.search(r"raise it to ([\d.]+)", str(refused.value))[1])
    check_cache(model, RolloutOptions(tensor_parallel=workers, dtype="float32", kv_cache_gib=enough), longest)
    with pytest.raises(UserError):
        check_cache(model, RolloutOptions(tensor_parallel=workers, dtype="float32", kv_cache_gib=enough / 2), longest)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_chosen_cache_holds_eight_requests_of_full_length_or_all_that_may_run(model, workers):
    for running, held in ((64, 8), (3, 3)):
        options = RolloutOptions(tensor_parallel=workers, dtype="bfloat16", max_running_requests=running)
        chosen = choose_cache(model, options, 10_000, None, on_cpu=True)
        assert held * 10_000 <= cached_tokens(model, chosen) <= held * 10_000 + 64 * held + (1 << 20)
        check_cache(model, chosen, 10_000)


def test_a_chosen_cache_leaves_room_for_the_model_and_is_refused_where_no_request_fits(model):
    options = RolloutOptions(dtype="float32", max_running_requests=16)
    worker = worker_memory(model, options, 0, True, 100_000)
    request = 100_064 * 2 * LAYERS * KV_HEADS * HEAD_DIM * 4
    room = worker.weights + worker.batch + 3 * request
    assert cached_tokens(model, choose_cache(model, options, 100_000, room, on_cpu=True)) // 100_064 == 3
    with pytest.raises(UserError, match=r"one prompt and response of 100,000 tokens 0\.1; set engine\.tensor_parallel, or lower"):
        choose_cache(model, options, 100_000, room - 3 * request + request // 2, on_cpu=True)


@pytest.mark.parametrize("tied", [True, False])
def test_a_workers_memory_is_counted_by_hand(tmp_path, tied):
    save_tiny("llama", tmp_path / str(tied), tied=tied)
    model = read_model(tmp_path / str(tied))
    dims, whole = model.dims, sum(math.prod(shape) for shape in model.tensor_shapes.values())
    options = RolloutOptions(dtype="bfloat16", kv_cache_gib=0.25, max_running_requests=7)
    on_cpu, on_gpu = (worker_memory(model, options, 1 << 30, cpu, max_model_len=3000) for cpu in (True, False))
    assert on_gpu.weights == 2 * whole
    assert on_cpu.weights == 2 * (whole + (dims.vocab * dims.hidden if tied else 0))  # the packed copy of the head
    assert on_cpu.kv_cache == GIB // 4 and on_cpu.incoming == 2 * (whole + dims.vocab * dims.hidden)  # and the largest tensor again
    logits = 7 * dims.vocab * 4
    assert on_gpu.batch == 2 * 3000 * (4 * dims.hidden + 3 * dims.ffn) + 5 * logits
    assert on_cpu.batch == int(1.75 * on_gpu.batch)
    assert on_cpu.total == on_cpu.weights + on_cpu.kv_cache + on_cpu.incoming + on_cpu.batch
