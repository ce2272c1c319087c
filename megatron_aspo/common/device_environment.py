"""Environment variables that CUDA, NCCL and Transformer Engine read at start-up: one table for training ranks and engines.

Imports nothing, so that a process can set them before any other import. Without a GPU most of them are not read.
"""

from collections.abc import Mapping

_BOTH_SIDES = {
    # Trainer and engine form one NCCL communicator for weights, so both must allocate NCCL's device memory the same way. vLLM's own
    # examples of weight updates set 0 on both sides.
    "NCCL_CUMEM_ENABLE": "0",
}
_DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # required by torch's deterministic matrix products
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",  # Transformer Engine's attention; Megatron's deterministic_mode checks it
    "NCCL_ALGO": "^NVLS",  # reductions inside the switch have no fixed order
}


def rank_environment(
    interface: str, tensor_parallel: int, context_parallel: int, deterministic: bool, given: Mapping[str, str]
) -> dict[str, str]:
    """Return the variables that a training rank adds to its environment `given` before CUDA is used.

    interface: that of the cluster's private network, the only one on which process groups listen.
    """
    variables = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    usual = dict(_BOTH_SIDES)
    if tensor_parallel > 1 or context_parallel > 1:
        # Megatron overlaps communication with matrix products and relies on kernels starting in launch order. Blackwell does not need
        # it.
        usual["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if deterministic:
        variables |= _DETERMINISTIC
    return variables | _unless_given(usual, given)


def engine_environment(interface: str, given: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that an engine on a GPU adds to its environment `given` before it imports vLLM."""
    return {"NCCL_SOCKET_IFNAME": interface} | _unless_given(_BOTH_SIDES, given)


def _unless_given(usual: Mapping[str, str], given: Mapping[str, str]) -> dict[str, str]:
    """Return the entries of `usual` whose variables are not in `given`."""
    return {name: value for name, value in usual.items() if name not in given}
