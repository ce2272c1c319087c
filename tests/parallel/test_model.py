"""The model on real processes: logits against transformers, the vocabulary-parallel output layer, export."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.trainer.options import OptimizerOptions, TrainerOptions
from megatron_aspo.trainer.settings import RankSettings
from tests.models import save_tiny
from tests.parallel import workloads
from tests.parallel.logits import VOCAB, assert_logits_equal_transformers


def settings(directory, dtype: str = "float32", **layout) -> RankSettings:
    return RankSettings(directory, TrainerOptions(dtype=dtype, **layout), OptimizerOptions(), AlgorithmOptions(kl_coef=0.0), 1.0, 0, 2, 32)


MODELS = ("llama untied", "llama tied", "qwen2 untied", "qwen2 tied", "qwen3 untied", "mistral untied", "seed_oss untied")


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    family, tying = request.param.split()
    directory = tmp_path_factory.mktemp("model")
    return directory, save_tiny(family, directory, tied=tying == "tied", vocab_size=VOCAB, num_hidden_layers=2)


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_logits_of_packed_sequences_equal_transformers(pools, model, tensor_parallel):
    directory, reference = model
    assert_logits_equal_transformers(pools, settings(directory, tensor_parallel=tensor_parallel), reference)


@pytest.mark.parametrize("layout", [{}, {"tensor_parallel": 2, "pipeline_parallel": 2}, {"data_parallel": 2}], ids=str)
def test_an_export_holds_exactly_the_loaded_tensors(pools, model, layout, tmp_path):
    directory, reference = model
    chosen = settings(directory, **layout)
    pools(chosen.sizes.world).run(workloads.export, chosen, tmp_path / "export", "float32")
    source, written = load_file(directory / "model.safetensors"), load_file(tmp_path / "export" / "model.safetensors")
    assert set(source) == set(written)
    assert all(torch.equal(source[name], written[name]) for name in source)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, reference(ids).logits)
    assert json.loads((tmp_path / "export" / "config.json").read_text())["dtype"] == "float32"
    assert not list(tmp_path.glob("*.unfinished"))


def test_an_export_does_not_overwrite(pools, model, tmp_path):
    (tmp_path / "export").mkdir()
    with pytest.raises(RuntimeError, match="exists"):
        pools(1).run(workloads.export, settings(model[0]), tmp_path / "export", "float32")
    assert not list((tmp_path / "export").iterdir())


@pytest.mark.parametrize("world", [2, 4])
def test_a_sharded_vocabulary_changes_no_value_and_no_gradient(pools, world):
    random = np.random.default_rng(0)
    vocab, padded, tokens = 37, 40, 11
    hidden, weight = random.normal(size=(tokens, 8)), random.normal(size=(padded, 8))
    targets, upstream = random.integers(0, vocab, tokens), random.normal(size=(2, tokens))
    results = pools(world).run(workloads.vocab_parallel_logprobs, world, hidden, weight, targets, list(upstream), vocab)
    h, w = torch.from_numpy(hidden).requires_grad_(), torch.from_numpy(weight).requires_grad_()
    full = (h @ w[:vocab].T / 0.8).log_softmax(-1)
    truth = full.gather(1, torch.from_numpy(targets)[:, None])[:, 0], -(full.exp() * full).sum(-1)
    torch.autograd.backward(truth, list(torch.from_numpy(upstream)))
    for logprob, entropy, grad_hidden, _ in results:
        assert np.allclose(logprob, truth[0].detach().numpy(), rtol=1e-12, atol=1e-12)
        assert np.allclose(entropy, truth[1].detach().numpy(), rtol=1e-12, atol=1e-12)
        assert np.allclose(grad_hidden, h.grad.numpy(), rtol=1e-11, atol=1e-12)
    assert np.allclose(np.concatenate([r[3] for r in results]), w.grad.numpy(), rtol=1e-11, atol=1e-12)
