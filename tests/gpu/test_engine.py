"""An engine on a GPU; needs Ray and vLLM. Not yet run on hardware."""

import numpy as np
import pytest
import torch

from tests.models import save_tiny

pytest.importorskip("ray")
pytest.importorskip("vllm")

from megatron_aspo.rollout.engine import Request
from megatron_aspo.rollout.options import RolloutOptions
from megatron_aspo.rollout.pool import EnginePool

pytestmark = pytest.mark.gpu


def test_an_engine_on_cuda_agrees_with_transformers(ray_cluster, tmp_path):
    from transformers import AutoModelForCausalLM

    save_tiny("qwen2", tmp_path, tied=True, vocab_size=64)
    pool = EnginePool(str(tmp_path), RolloutOptions(dtype="float32", max_running_requests=4), max_model_len=256, device="cuda")
    try:
        pool.start()
        pool.sleep()
        pool.wake()
        prompt = tuple(range(3, 60))
        (generation,) = pool.generate([Request("one", prompt, seed=0, max_tokens=16, temperature=1.0)])
    finally:
        pool.shutdown()
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.tensor([[*prompt, *generation.token_ids.tolist()]])
    with torch.no_grad():
        logprobs = model(ids).logits[0].log_softmax(-1)[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]
    assert np.abs(logprobs.numpy() - generation.logprobs).max() < 1e-3
