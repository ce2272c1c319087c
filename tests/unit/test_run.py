"""What a run refuses before its processes start."""

from pathlib import Path

import pytest

from megatron_aspo.checkpoint.manifest import Manifest
from megatron_aspo.config import Config
from megatron_aspo.errors import UserError
from megatron_aspo.rollout.options import RolloutOptions
from megatron_aspo.runtime.cluster import Cluster
from megatron_aspo.runtime.ledger import Ledger
from megatron_aspo.runtime.run import _check_ledger, _check_resources
from megatron_aspo.runtime.start import Start
from megatron_aspo.weights.layout import ParallelSizes


@pytest.mark.parametrize(
    ("device", "slots", "needed"),
    [("cpu", 3, "4 training ranks and 2 engines need 6 CPUs"), ("cuda", 7, "4 training ranks and 2 engines need 8 GPUs")],
)
def test_more_processes_than_the_cluster_has_places_for_are_refused(device, slots, needed):
    config = Config(rollout=RolloutOptions(engines=2, tensor_parallel=2))
    with pytest.raises(UserError, match=f"{needed} of the Ray cluster, which has {slots}"):
        _check_resources(config, Cluster(ours=False, cores=2, device=device, slots=slots), ranks=4)
    _check_resources(config, Cluster(ours=False, cores=2, device=device, slots=8), ranks=4)


def test_a_ledger_that_lost_lines_since_the_checkpoint_is_refused_by_the_counts(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for step in range(3):
        ledger.append("trained", step=step)
    ledger.close()

    def start(lines: int, run: Path) -> Start:
        manifest = Manifest("LlamaForCausalLM", "float32", "local", ParallelSizes(), {}, {"step": 3, "ledger_lines": lines})
        return Start(run == tmp_path, run / "checkpoints" / "step_3", manifest)

    ledger = Ledger(tmp_path / "ledger.jsonl")
    _check_ledger(ledger, start(3, tmp_path), tmp_path)
    _check_ledger(ledger, start(9, tmp_path / "another run"), tmp_path)
    with pytest.raises(UserError, match=r"ledger\.jsonl has 3 lines, at step_3 it had 4: it was changed since"):
        _check_ledger(ledger, start(4, tmp_path), tmp_path)
    ledger.close()
