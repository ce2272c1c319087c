"""Models with scaled rotary embeddings give the logits of transformers, beyond the length that they were first trained on."""

import json

import pytest

from tests.models import rope_scaling, save_tiny
from tests.parallel import workloads
from tests.parallel.logits import VOCAB, assert_logits_equal_transformers
from tests.parallel.test_model import settings


@pytest.mark.parametrize(("family", "kind"), [("llama", "llama3"), ("qwen2", "yarn"), ("mistral", "linear")])
def test_logits_beyond_the_original_length_equal_transformers(pools, tmp_path, family, kind):
    reference = save_tiny(family, tmp_path, vocab_size=VOCAB, **rope_scaling(kind))
    assert_logits_equal_transformers(pools, settings(tmp_path, tensor_parallel=2), reference, lengths=(120, 9, 30))


@pytest.mark.parametrize("kind", ["yarn", *(pytest.param(kind, marks=pytest.mark.nightly) for kind in ("linear", "llama3"))])
def test_an_export_keeps_the_scaling(pools, tmp_path, kind):
    save_tiny("llama", tmp_path / "model", vocab_size=VOCAB, **rope_scaling(kind))
    pools(1).run(workloads.export, settings(tmp_path / "model"), tmp_path / "export", "bfloat16")
    source, written = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "export"))
    assert written["rope_parameters"] == source["rope_parameters"] and written["rope_parameters"]["rope_type"] == kind
