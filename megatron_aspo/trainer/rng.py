"""The state of every random generator of a training rank, as named tensors, which safetensors files can hold without pickle."""

import random
import struct
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_generators(seed: int) -> None:
    """Seed torch's, NumPy's and Python's generators: a custom loss may use any, and the latter two start differently in every process."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def rng_states() -> dict[str, Tensor]:
    """Return the global generators' states, uint8 or int64 on the CPU, as `torch`, `cuda` where present, `megatron.<name>` for Megatron's
    tracker, `numpy`, `python`.
    """
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    for name, state in _tracker().get_states().items():
        states[f"megatron.{name}"] = state.clone()
    return states | {"numpy": _numpy_state(), "python": _python_state()}


def restore_rng(states: dict[str, Tensor]) -> None:
    """Set every generator to its state in `states`, as `rng_states` returned them.

    Raises ValueError naming an unknown or missing state, before any generator is changed.
    """
    here = rng_states().keys()
    for problem, names in (("missing", here - states.keys()), ("unknown here", states.keys() - here)):
        if names:
            raise ValueError(f"random states {problem}: {', '.join(sorted(names))}")
    _set_numpy_state(states["numpy"])
    _set_python_state(states["python"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    prefix = "megatron."
    tracked = {name.removeprefix(prefix): state.clone() for name, state in states.items() if name.startswith(prefix)}
    if tracked:
        _tracker().set_states(tracked)


def _tracker() -> Any:  # Megatron declares no types
    from megatron.core import tensor_parallel

    return tensor_parallel.get_cuda_rng_tracker()


def _numpy_state() -> Tensor:
    """Return int64 [627]: 624 words, the position in them, whether a normal number is cached, its bits.

    Raises ValueError if the generator is not a Mersenne Twister.
    """
    state = np.random.get_state(legacy=False)
    if state["bit_generator"] != "MT19937":
        raise ValueError(f"NumPy's global generator is {state['bit_generator']}; only MT19937, its default, can be stored")
    words, position = state["state"]["key"].tolist(), state["state"]["pos"]
    return torch.tensor([*words, position, state["has_gauss"], _bits(state["gauss"])], dtype=torch.int64)


def _set_numpy_state(state: Tensor) -> None:
    *words, position, waits, normal = state.tolist()
    np.random.set_state(("MT19937", np.array(words, dtype=np.uint32), position, waits, _number(normal)))


def _python_state() -> Tensor:
    """Return the state of Python's `random`, int64 [628]: version, 624 words, position in them, whether `gauss` has a value, its bits."""
    version, words, normal = random.getstate()
    waits = normal is not None
    return torch.tensor([version, *words, waits, _bits(normal if waits else 0.0)], dtype=torch.int64)


def _set_python_state(state: Tensor) -> None:
    version, *words, waits, normal = state.tolist()
    random.setstate((version, tuple(words), _number(normal) if waits else None))


def _bits(number: float) -> int:
    return struct.unpack("<q", struct.pack("<d", number))[0]


def _number(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]
