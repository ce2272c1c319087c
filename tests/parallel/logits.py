"""Compares our logits with those of transformers."""

import numpy as np
import torch

from megatron_aspo.trainer.settings import RankSettings
from tests.parallel import workloads

VOCAB = 131


def assert_logits_equal_transformers(pools, settings: RankSettings, reference, lengths=(7, 1, 40, 12)) -> None:
    """Assert it on packed sequences of several lengths, to 1e-5 in float32."""
    random = np.random.default_rng(0)
    sequences = [random.integers(0, VOCAB, n).tolist() for n in lengths]
    shares = pools(settings.sizes.world).run(workloads.logits, settings, sequences)
    ours = np.concatenate(shares, axis=1)[:, :VOCAB]
    with torch.no_grad():
        theirs = np.concatenate([reference(torch.tensor([s])).logits[0].numpy() for s in sequences])
    assert np.abs(ours - theirs).max() <= 1e-5
