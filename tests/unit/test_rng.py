"""Random generators as tensors: after a restore they draw the same numbers as before."""

import random

import numpy as np
import pytest
import torch
from safetensors.torch import load, save


@pytest.fixture(autouse=True)
def generators():
    """Megatron's tracker with two states; every generator of this process is restored afterwards."""
    from megatron_aspo.trainer import megatron_adapter

    megatron_adapter.prepare()  # before any other import of Megatron-Core
    from megatron.core import tensor_parallel

    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    tracker = tensor_parallel.get_cuda_rng_tracker()
    states, seeds = tracker.get_states(), tracker.seeds_
    tracker.reset()
    tracker.add("model-parallel-rng", 11)
    tracker.add("data-parallel-rng", 12)
    yield
    tracker.set_states(states)
    tracker.seeds_ = seeds
    torch.set_rng_state(before[0])
    np.random.set_state(before[1])
    random.setstate(before[2])


def draw() -> list:
    """Draw from every generator. NumPy and Python make normal numbers two at a time; one is left waiting in each."""
    from megatron.core import tensor_parallel

    tracked = []
    for name in ("model-parallel-rng", "data-parallel-rng"):
        with tensor_parallel.get_cuda_rng_tracker().fork(name):
            tracked += torch.randn(5).tolist()
    numbers = [np.random.normal() for _ in range(3)], [random.gauss(0, 1) for _ in range(3)]
    return [*tracked, *torch.randn(5).tolist(), *numbers[0], *numbers[1], np.random.randint(1 << 30), random.getrandbits(64)]


def scramble() -> None:
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    draw()


@pytest.mark.parametrize("numbers_before", [0, 1], ids=["no normal waits", "a normal waits"])
def test_a_restored_generator_draws_the_same_numbers(numbers_before):
    from megatron_aspo.trainer.rng import restore_rng, rng_states

    scramble()
    [(np.random.normal(), random.gauss(0, 1)) for _ in range(numbers_before)]
    kept = save(rng_states())  # through their file format
    expected = [draw(), draw()]
    scramble()
    assert draw() != expected[0]
    restore_rng(load(kept))
    assert [draw(), draw()] == expected


def test_states_are_copies_that_later_draws_do_not_change():
    from megatron_aspo.trainer.rng import restore_rng, rng_states

    states = rng_states()
    copies = {name: state.clone() for name, state in states.items()}
    expected = draw()
    for _ in range(2):  # a restore can be repeated, because it does not change the given states
        restore_rng(states)
        assert draw() == expected
    assert all(torch.equal(states[name], copies[name]) for name in copies)


def test_every_generator_has_its_own_tensor():
    from megatron_aspo.trainer.rng import rng_states

    before = rng_states()
    expected = {"torch", "megatron.model-parallel-rng", "megatron.data-parallel-rng", "numpy", "python"}
    assert before.keys() - {"cuda"} == expected and all(state.dtype in (torch.uint8, torch.int64) for state in before.values())
    draw()
    after = rng_states()
    assert all(not torch.equal(before[name], after[name]) for name in expected)


def test_a_missing_or_unknown_state_is_named_and_nothing_is_changed():
    from megatron_aspo.trainer.rng import restore_rng, rng_states

    states = rng_states()
    scramble()
    before = rng_states()
    with pytest.raises(ValueError, match=r"missing: megatron\.data-parallel-rng, numpy$"):
        restore_rng({name: state for name, state in states.items() if name not in ("numpy", "megatron.data-parallel-rng")})
    with pytest.raises(ValueError, match=r"unknown here: megatron\.expert-parallel-rng$"):
        restore_rng(states | {"megatron.expert-parallel-rng": states["torch"]})
    assert all(torch.equal(state, before[name]) for name, state in rng_states().items())


def test_a_different_generator_for_numpy_is_refused():
    from megatron_aspo.trainer.rng import rng_states

    original = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(1))
    try:
        with pytest.raises(ValueError, match="PCG64"):
            rng_states()
    finally:
        np.random.set_bit_generator(original)
