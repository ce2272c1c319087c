"""What a run refuses before its processes start."""

import pytest

from megatron_aspo.config import Config
from megatron_aspo.errors import UserError
from megatron_aspo.rollout.options import RolloutOptions
from megatron_aspo.runtime.cluster import Cluster
from megatron_aspo.runtime.run import _check_resources


@pytest.mark.parametrize(
    ("device", "slots", "needed"),
    [("cpu", 3, "4 training ranks and 2 engines need 6 CPUs"), ("cuda", 7, "4 training ranks and 2 engines need 8 GPUs")],
)
def test_more_processes_than_the_cluster_has_places_for_are_refused(device, slots, needed):
    config = Config(rollout=RolloutOptions(engines=2, tensor_parallel=2))
    with pytest.raises(UserError, match=f"{needed} of the Ray cluster, which has {slots}"):
        _check_resources(config, Cluster(ours=False, cores=2, device=device, slots=slots), ranks=4)
    _check_resources(config, Cluster(ours=False, cores=2, device=device, slots=8), ranks=4)
