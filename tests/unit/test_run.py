"""Mistakes that a run refuses before its processes start."""

from pathlib import Path

import pytest

from megatron_aspo.checkpoint.manifest import Manifest
from megatron_aspo.common.errors import UserError
from megatron_aspo.config import Config
from megatron_aspo.losses.options import AlgorithmOptions
from megatron_aspo.observe.progress import Progress
from megatron_aspo.rollout.options import RolloutOptions
from megatron_aspo.runtime.cluster import Cluster, computes_bfloat16
from megatron_aspo.runtime.directory import check_ledger
from megatron_aspo.runtime.ledger import Ledger
from megatron_aspo.runtime.processes import check_resources, warn_if_not_bitwise_resumable
from megatron_aspo.runtime.start import Start
from megatron_aspo.trainer.options import OptimizerOptions, TrainerOptions
from megatron_aspo.trainer.settings import RankSettings
from megatron_aspo.weights.layout import ParallelSizes


@pytest.mark.parametrize(
    ("device", "slots", "needed"),
    [("cpu", 3, "4 training ranks and 2 engines need 6 CPUs"), ("cuda", 7, "4 training ranks and 2 engines need 8 GPUs")],
)
def test_more_processes_than_the_cluster_has_devices_are_refused(device, slots, needed):
    config = Config(rollout=RolloutOptions(engines=2, tensor_parallel=2))
    with pytest.raises(UserError, match=f"{needed} of the Ray cluster, which has {slots}"):
        check_resources(config, Cluster(ours=False, cores=2, device=device, slots=slots), ranks=4)
    check_resources(config, Cluster(ours=False, cores=2, device=device, slots=8), ranks=4)


def test_more_processes_than_the_cluster_has_of_a_named_resource_are_refused():
    config = Config(trainer=TrainerOptions(resource="big"), rollout=RolloutOptions(engines=2, resource="big"))
    have = {"big": 6.0}
    check_resources(config, Cluster(ours=False, cores=2, device="cpu", slots=8, resources=have), ranks=4)
    with pytest.raises(UserError, match=r"trainer\.resource=big: training ranks take 1 each of it, 7 in all, and the Ray cluster has 6"):
        check_resources(config, Cluster(ours=False, cores=2, device="cpu", slots=8, resources=have), ranks=5)
    other = Config(rollout=RolloutOptions(engines=2, resource="engines"))
    with pytest.raises(
        UserError, match=r"rollout\.resource=engines: engines take 1 each of it, 2 in all, and the Ray cluster has 0; start"
    ):
        check_resources(other, Cluster(ours=False, cores=2, device="cpu", slots=8, resources=have), ranks=4)


def test_a_ledger_that_lost_lines_since_the_checkpoint_is_refused_by_the_counts(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for step in range(3):
        ledger.append("trained", step=step)
    ledger.close()

    def start(lines: int, run: Path) -> Start:
        manifest = Manifest("LlamaForCausalLM", "float32", "local", ParallelSizes(), {}, {"step": 3, "ledger_lines": lines})
        return Start(run == tmp_path, run / "checkpoints" / "step_3", manifest)

    ledger = Ledger(tmp_path / "ledger.jsonl")
    check_ledger(ledger, start(3, tmp_path), tmp_path)
    check_ledger(ledger, start(9, tmp_path / "another run"), tmp_path)
    with pytest.raises(UserError, match=r"ledger\.jsonl has 3 lines, at step_3 it had 4: it was changed since"):
        check_ledger(ledger, start(4, tmp_path), tmp_path)
    ledger.close()


@pytest.mark.parametrize(
    ("deterministic", "threads", "layout", "message"),
    [
        (True, {"trainer": 1, "rollout": 2}, {}, []),
        (True, {"trainer": 2, "rollout": 2}, {}, ["trainer.threads was 1, is 2"]),
        (
            True,
            {"trainer": 1, "rollout": 4},
            {"tensor_parallel": 2},
            ["rollout.threads was 2, is 4", "the layout of the training ranks is another"],
        ),
        (False, {"trainer": 2, "rollout": 2}, {"tensor_parallel": 2}, []),
    ],
)
def test_a_deterministic_run_reports_why_it_is_not_the_undisturbed_one(tmp_path, capsys, deterministic, threads, layout, message):
    manifest = Manifest("LlamaForCausalLM", "float32", "local", ParallelSizes(), {}, {"threads": {"trainer": 1, "rollout": 2}})
    settings = RankSettings(tmp_path, TrainerOptions(**layout), OptimizerOptions(), AlgorithmOptions(), 1.0, 0, 1, 1)
    progress = Progress(1)
    warn_if_not_bitwise_resumable(Start(True, tmp_path, manifest), Config(deterministic=deterministic), settings, threads, progress)
    progress.close()
    printed = " ".join("".join(capsys.readouterr()).split())
    assert ("not the undisturbed one" in printed) == bool(message) and all(part in printed for part in message), printed


@pytest.mark.parametrize(("flags", "has"), [("avx2 avx512f", False), ("avx2 avx512_bf16 f16c", True), ("amx_bf16 amx_tile", True)])
def test_a_processor_computes_in_bfloat16_when_its_flags_list_it(tmp_path, flags, has):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\n")
    assert computes_bfloat16(tmp_path / "cpuinfo") == has
