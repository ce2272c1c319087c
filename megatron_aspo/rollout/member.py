"""One engine as the pool sees it: its Ray actor, where that lives, and what to raise when it fails."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from megatron_aspo.common.errors import UserError
from megatron_aspo.common.import_path import child_python_path, one_line
from megatron_aspo.rollout.engine import Engine, EngineError, EngineInfo
from megatron_aspo.rollout.engine_settings import EngineSpec, environment

_MAX_CONCURRENT_CALLS = 4096


@dataclass
class Member:
    """One engine, seen from the driver."""

    spec: EngineSpec
    actor: Any
    home: ray.ObjectRef | None = None
    """The pending answer of the actor: its node and process id."""
    info: EngineInfo | None = None
    shared_devices: tuple[str, str] | None = None
    """Ray's id of the node, and the devices on it, that it shares with training ranks; None: it has its own."""
    load: int = 0
    """Its number of unfinished requests."""

    @property
    def name(self) -> str:
        return f"engine {self.spec.index}"

    @property
    def report(self) -> EngineInfo:
        """The engine's report from its start. Raises EngineError before that, and after its end."""
        if self.info is None:
            raise EngineError(f"{self.name} is not running")
        return self.info

    def create_actor(self, resource: str) -> None:
        """Create the engine's actor, which is not started yet. resource: Ray resource of which it takes 1; empty for none."""
        self.actor = ray.remote(Engine).options(**self._actor_options(resource)).remote(self.spec)
        self.home = self.actor.home.remote()

    def find_home(self) -> tuple[str, int] | None:
        """Return node and process id of the actor; None if there is none, or it does not answer."""
        if self.home is None:
            return None
        try:
            return ray.get(self.home, timeout=1.0)
        except (RayActorError, RayTaskError, GetTimeoutError):
            return None

    def _actor_options(self, resource: str) -> dict[str, Any]:
        spec = self.spec
        # vLLM's child processes import this package too, even from a checkout that is not installed.
        variables = environment(spec) | {"PYTHONPATH": child_python_path()}
        gpus, cpus = spec.tensor_parallel if spec.device == "cuda" else 0, 1
        options: dict[str, Any] = {}
        if self.shared_devices is not None:
            node, devices = self.shared_devices
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
            cpus = 0  # the rank whose device it shares has the token
            if devices:
                # Ray has assigned them to another actor.
                gpus = 0
                variables |= {"CUDA_VISIBLE_DEVICES": devices, "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
        return options | {
            # One CPU is a token, not a number of threads: engines and training ranks of a node take turns, and both use all its cores.
            "num_cpus": cpus,
            "num_gpus": gpus,
            "resources": {resource: 1} if resource else {},
            "max_concurrency": _MAX_CONCURRENT_CALLS,
            "max_restarts": 0,
            "runtime_env": {"env_vars": variables},
        }


def explain(name: str, error: Exception) -> Exception:
    """Return the exception to raise for a failed call: the engine's own if it could still raise one."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        return cause if isinstance(cause, (UserError, EngineError, ValueError)) else EngineError(f"{name} failed:\n{error}")
    return EngineError(
        f"{name} died: {one_line(error)}; its last lines are in Ray's worker logs. A process that is killed without a "
        "word usually ran out of memory"
    )


def run_on(node_id: str, function: Callable[..., None], *arguments: Any) -> ray.ObjectRef:
    """Call a function on this node of the cluster; return the reference of its answer."""
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(function).options(num_cpus=0, scheduling_strategy=strategy).remote(*arguments)
