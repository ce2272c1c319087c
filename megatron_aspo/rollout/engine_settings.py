"""What an engine is made of, and the vLLM settings that follow from it, per device.

Pure data: nothing here imports vLLM, torch or Ray, so the driver can set an engine's environment before its process imports anything.
"""

from dataclasses import dataclass
from typing import Any

from megatron_aspo.common.host_memory import KEEP_FREED_MEMORY

GIB = 1 << 30
TRANSFER_BACKEND = "megatron_aspo"
READABLE = "MEGATRON_ASPO_READABLE_WEIGHTS"
"""Environment variable that `EngineSpec.readable` sets."""
FORKS_ENGINE_CORE = {"cpu": True, "cuda": False}
"""Whether an engine's process forks vLLM's engine core, by device; else vLLM spawns it. A process that uses CUDA cannot be forked."""
_START_SHARE = 0.01
"""Share of a GPU's memory that vLLM checks to be free when an engine starts. 0.92 by default, which no two engines and no colocated engine
find free. With `kv_cache_memory_bytes`, which fixes the cache's size, vLLM 0.32 uses the share for nothing else."""
_MIN_BATCHED_TOKENS = 2048
"""Tokens that one step of a CPU engine may compute, at least."""


@dataclass(frozen=True)
class EngineSpec:
    """One engine."""

    index: int
    """Its place in the pool; names it in errors."""
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
    """CPU kernels pack weights beyond reading; with this they stay as they are, at the price of speed."""

    @property
    def threads_per_worker(self) -> int:
        """OpenMP threads of each of vLLM's worker processes."""
        return max(1, self.threads // self.tensor_parallel)


def environment(spec: EngineSpec) -> dict[str, str]:
    """Environment variables that the engine's processes must find when they start."""
    common = {
        "HF_HUB_OFFLINE": "1",  # models are directories; read when huggingface_hub is imported
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        # An engine lives on one node: its processes talk over loopback, never over an interface others can reach.
        "VLLM_HOST_IP": "127.0.0.1",
        # Ray sets this from num_cpus on its own; what an engine uses has to be stated.
        "OMP_NUM_THREADS": str(spec.threads_per_worker),
    }
    if spec.readable:
        common[READABLE] = "1"
    if spec.device == "cpu":
        common |= KEEP_FREED_MEMORY
        return common | {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the default binds every engine of a node to the same cores
            # vLLM 0.32 turns the uni-process executor into a multi-process one on CPU (one process more) unless this is 0. AsyncLLM keeps
            # its engine core in a process of its own all the same.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if spec.tensor_parallel == 1 else "1",
            # Eager engines still compile a helper of the logprobs, in the first batch that asks for them: 10 s for nothing on CPU.
            "TORCHDYNAMO_DISABLE": "1",
        }
    return common


def engine_arguments(spec: EngineSpec) -> dict[str, Any]:
    """Keyword arguments of vLLM's AsyncEngineArgs."""
    common = {
        "model": spec.model,
        # The files that the training ranks read. By default vLLM prefers Mistral's own format where a consolidated*.safetensors is there.
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
        # log-softmax(logits / temperature): the distribution that was sampled from. `raw_logprobs` ignores the temperature.
        "logprobs_mode": "processed_logprobs",
        # Sampling is what the request says: defaults of the model's generation_config.json (top_p, top_k, …) stay out. Its
        # end-of-sequence ids are still honoured, vLLM reads those separately.
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
            # A prompt is computed in one step, whole. When a step computes part of the prompt of a request with a seed, vLLM 0.32 winds the
            # request's generator back, in a way that only CUDA generators know: on CPU the engine core dies of it.
            "enable_chunked_prefill": False,
            # The responses of a group share whole blocks of their prompt. vLLM takes 128 tokens, more than short prompts have: each is then
            # computed once per response, twice the time of generation with 44 and 12 tokens. Its fast kernels ask for multiples of 32.
            "block_size": 32,
            "max_num_batched_tokens": batched_tokens(spec.max_model_len, spec.max_running_requests),
        }
    return common | {"enable_sleep_mode": True, "gpu_memory_utilization": _START_SHARE}


def batched_tokens(max_model_len: int, max_running_requests: int) -> int:
    """Tokens that one step of a CPU engine may compute: whole prompts have to fit."""
    return max(_MIN_BATCHED_TOKENS, max_model_len, max_running_requests)
