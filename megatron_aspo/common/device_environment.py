"""Environment variables that CUDA, NCCL and Transformer Engine read when they start: one table for training ranks and engines.

Imports nothing, so that a process can set them before it imports anything else. Without a GPU nobody reads most of them.
"""

from collections.abc import Mapping

_BOTH_SIDES = {
    # Trainer and engine form one NCCL communicator for weights, so both must take device memory for NCCL the same way. 0 is what vLLM's own
    # examples of weight updates set on both sides.
    "NCCL_CUMEM_ENABLE": "0",
}
_DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # torch's deterministic matrix products want it
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",  # Transformer Engine's attention; Megatron's deterministic_mode checks it
    "NCCL_ALGO": "^NVLS",  # sums inside the switch come in any order
}


def rank_environment(
    interface: str, tensor_parallel: int, context_parallel: int, deterministic: bool, given: Mapping[str, str]
) -> dict[str, str]:
    """Return what a training rank adds to its environment, which is `given`, before CUDA is used.

    interface: of the cluster's private network. Process groups listen on it alone.
    """
    variables = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    usual = dict(_BOTH_SIDES)
    if tensor_parallel > 1 or context_parallel > 1:
        # Megatron overlaps communication with matrix products and counts on kernels to start in the order of their launches. Blackwell
        # does not need it.
        usual["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if deterministic:
        variables |= _DETERMINISTIC
    return variables | _unless_given(usual, given)


def engine_environment(interface: str, given: Mapping[str, str]) -> dict[str, str]:
    """Return what an engine on a GPU adds to its environment, which is `given`, before it imports vLLM."""
    return {"NCCL_SOCKET_IFNAME": interface} | _unless_given(_BOTH_SIDES, given)


def _unless_given(usual: Mapping[str, str], given: Mapping[str, str]) -> dict[str, str]:
    """Return the usual values of the variables that are not given."""
    return {name: value for name, value in usual.items() if name not in given}
