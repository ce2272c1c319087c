"""The specification of an engine, and the vLLM settings that follow from it on each device.

Pure data: nothing here imports vLLM, torch or Ray, so that the driver can set an engine's environment before its process imports anything.
"""

from dataclasses import dataclass
from typing import Any

from megatron_aspo.common.host_memory import KEEP_FREED_MEMORY

GIB = 1 << 30
TRANSFER_BACKEND = "megatron_aspo"
READABLE = "MEGATRON_ASPO_READABLE_WEIGHTS"
"""Environment variable that `EngineSpec.readable` sets."""
FORKS_ENGINE_CORE = {"cpu": True, "cuda": False}
"""Device → whether an engine's process forks vLLM's engine core; otherwise vLLM spawns it. A process that uses CUDA cannot be forked."""
_START_SHARE = 0.01
"""Share of a GPU's memory that must be free when vLLM starts an engine. The default, 0.92, is never free for a second or a colocated
engine. With `kv_cache_memory_bytes`, which fixes the cache's size, vLLM 0.32 uses the share for nothing else."""
_MIN_BATCHED_TOKENS = 2048
"""Lower bound on the tokens that one step of a CPU engine may compute."""


@dataclass(frozen=True)
class EngineSpec:
    """One engine."""

    index: int
    """Its position in the pool; names it in errors."""
    model: str
    """Directory of a Hugging Face model: config.json, safetensors and, where it has one, generation_config.json."""
    device: str
    """`cpu | cuda`."""
    dtype: str
    """`float32 | bfloat16`: weights and arithmetic."""
    tensor_parallel: int
    expert_parallel: bool
    max_model_len: int
    """Longest prompt plus response, in tokens."""
    max_running_requests: int
    kv_cache_gib: float
    """Key-value cache of the whole engine."""
    threads: int
    """CPU threads of the whole engine."""
    seed: int
    """Seeds the engine's own generator; requests carry their own seeds."""
    stop_token_ids: tuple[int, ...]
    """End-of-sequence ids of the tokenizer. Those of the model's generation config stop a response as well."""
    readable: bool = False
    """Keep the weights unpacked, so that they can be read back. CPU kernels otherwise pack them irreversibly, and are faster."""

    @property
    def threads_per_worker(self) -> int:
        """OpenMP threads of each of vLLM's worker processes."""
        return max(1, self.threads // self.tensor_parallel)


def environment(spec: EngineSpec) -> dict[str, str]:
    """Return the environment variables that the engine's processes need when they start."""
    common = {
        "HF_HUB_OFFLINE": "1",  # models are directories; read when huggingface_hub is imported
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        # An engine runs on one node: its processes use loopback, never an interface that others can reach.
        "VLLM_HOST_IP": "127.0.0.1",
        # Otherwise Ray would set this from num_cpus.
        "OMP_NUM_THREADS": str(spec.threads_per_worker),
    }
    if spec.readable:
        common[READABLE] = "1"
    if spec.device == "cpu":
        common |= KEEP_FREED_MEMORY
        return common | {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the default binds every engine of a node to the same cores
            # vLLM 0.32 turns the uni-process executor into a multi-process one on CPU (one more process) unless this is 0. AsyncLLM still
            # runs its engine core in a separate process.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if spec.tensor_parallel == 1 else "1",
            # Eager engines still compile a helper for logprobs, in the first batch that requires them: 10 s for nothing on CPU.
            "TORCHDYNAMO_DISABLE": "1",
        }
    return common


def engine_arguments(spec: EngineSpec) -> dict[str, Any]:
    """Return the keyword arguments of vLLM's AsyncEngineArgs."""
    common = {
        "model": spec.model,
        # The files that the training ranks read. By default vLLM prefers Mistral's own format if there is a consolidated*.safetensors.
        "config_format": "hf",
        "load_format": "safetensors",
        "dtype": spec.dtype,
        "tensor_parallel_size": spec.tensor_parallel,
        "enable_expert_parallel": spec.expert_parallel,
        "distributed_executor_backend": "uni" if spec.tensor_parallel == 1 else "mp",
        "max_model_len": spec.max_model_len,
        "max_num_seqs": spec.max_running_requests,
        "kv_cache_memory_bytes": int(spec.kv_cache_gib * GIB) // spec.tensor_parallel,
        "seed": spec.seed,
        "enable_prefix_caching": True,
        # log-softmax(logits / temperature): the distribution that is sampled from. `raw_logprobs` ignores the temperature.
        "logprobs_mode": "processed_logprobs",
        # The request alone determines the sampling: defaults of the model's generation_config.json (top_p, top_k, …) are ignored. Its
        # end-of-sequence ids still apply; vLLM reads those separately.
        "generation_config": "vllm",
        # Token ids go in and come out.
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "trust_remote_code": False,
        "weight_transfer_config": {"backend": TRANSFER_BACKEND},
        "worker_extension_cls": "megatron_aspo.rollout.vllm_adapter.WorkerExtension",
    }
    if spec.device == "cpu":
        return common | {
            "enforce_eager": True,  # compiling takes a minute to start on CPU and decodes slower
            # A prompt is computed in a single step. When a step computes part of the prompt of a seeded request, vLLM 0.32 rewinds the
            # request's generator in a way that only CUDA generators support: on CPU the engine core crashes.
            "enable_chunked_prefill": False,
            # The responses of a group share whole blocks of their prompt. vLLM's default is 128 tokens, more than short prompts have: each
            # is then computed once per response, which doubles the time of generation with 44 and 12 tokens. Its fast kernels require
            # multiples of 32.
            "block_size": 32,
            "max_num_batched_tokens": batched_tokens(spec.max_model_len, spec.max_running_requests),
        }
    return common | {"enable_sleep_mode": True, "gpu_memory_utilization": _START_SHARE}


def batched_tokens(max_model_len: int, max_running_requests: int) -> int:
    """Return the tokens that one step of a CPU engine may compute: whole prompts must fit."""
    return max(_MIN_BATCHED_TOKENS, max_model_len, max_running_requests)
