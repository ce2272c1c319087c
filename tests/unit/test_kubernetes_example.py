"""The RayJob of examples/kubernetes: its fields have the types of KubeRay and Kubernetes, and it holds what the docs promise.

The types are written here as far as the example uses them (KubeRay 1.5, ray-operator/apis/ray/v1). No cluster has run it.
"""

import copy
import re

import jsonschema
import pytest
import yaml

from tests.unit.test_packaging import ROOT

TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}


def record(required: str = "", **fields: dict) -> dict:
    """Return the type of an object with exactly these fields."""
    return {"type": "object", "properties": fields, "required": required.split(), "additionalProperties": False}


def many(of: dict) -> dict:
    return {"type": "array", "items": of, "minItems": 1}


QUANTITY = {"anyOf": [COUNT, {"type": "string", "pattern": r"^\d+(\.\d+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"}]}
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}
KEY = record("name key", name=TEXT, key=TEXT, optional=FLAG)
VARIABLE = record("name", name=TEXT, value=TEXT, valueFrom=record(secretKeyRef=KEY))
CONTAINER = record(
    "name image",
    name=TEXT,
    image=TEXT,
    env=many(VARIABLE),
    resources=record(requests=QUANTITIES, limits=QUANTITIES),
    volumeMounts=many(record("name mountPath", name=TEXT, mountPath=TEXT, readOnly=FLAG)),
)
VOLUME = record(
    "name",
    name=TEXT,
    persistentVolumeClaim=record("claimName", claimName=TEXT),
    emptyDir=record(medium={"enum": ["", "Memory"]}, sizeLimit=QUANTITY),
)
POD = record(
    "spec",
    metadata=record(labels=TEXTS),
    spec=record("containers", restartPolicy={"enum": ["Always", "OnFailure", "Never"]}, containers=many(CONTAINER), volumes=many(VOLUME)),
)
CLUSTER = record(
    "headGroupSpec",
    rayVersion=TEXT,
    authOptions=record(mode={"enum": ["disabled", "token"]}, secretName=TEXT),
    headGroupSpec=record(
        "rayStartParams template", serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]}, rayStartParams=TEXTS, template=POD
    ),
    workerGroupSpecs=many(
        record(
            "groupName rayStartParams template",
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=TEXTS,
            template=POD,
        )
    ),
)
RAY_JOB = record(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=record("name", name={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47}),
    spec=record(
        "rayClusterSpec",
        entrypoint=TEXT,
        entrypointNumCpus={"type": "number"},
        backoffLimit=COUNT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        submitterConfig=record(backoffLimit=COUNT),
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=COUNT,
        rayClusterSpec=CLUSTER,
    ),
)


@pytest.fixture
def job() -> dict:
    return yaml.safe_load((ROOT / "examples/kubernetes/rayjob.yaml").read_text())


def test_every_field_is_one_of_kuberays_and_has_its_type(job):
    jsonschema.validate(job, RAY_JOB)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda spec: spec["rayClusterSpec"].update(authOption={"mode": "token"}),
        lambda spec: spec["rayClusterSpec"]["authOptions"].update(mode="on"),
        lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0].update(replicas="1"),
        lambda spec: spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update({"num-gpus": 8}),
        lambda spec: spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0].update(volumeMount=[]),
        lambda spec: spec.update(shutdownAfterJobFinish=True),
        lambda spec: spec.pop("rayClusterSpec"),
    ],
)
def test_a_wrong_field_would_be_noticed(job, spoil):
    spoilt = copy.deepcopy(job)  # the pods of head and workers are one object in the file
    spoil(spoilt["spec"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(spoilt, RAY_JOB)


def test_the_cluster_requires_a_token_and_no_secret_is_in_the_file(job):
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"]["mode"] == "token" and cluster["rayVersion"] == "2.60.0"
    for pod in (cluster["headGroupSpec"], cluster["workerGroupSpecs"][0]):
        (container,) = pod["template"]["spec"]["containers"]
        secrets = [variable for variable in container["env"] if re.search("TOKEN|KEY|PASSWORD", variable["name"])]
        assert secrets and all("value" not in variable and "secretKeyRef" in variable["valueFrom"] for variable in secrets)
        assert {"/shared", "/dev/shm"} == {mount["mountPath"] for mount in container["volumeMounts"]}


def test_the_entrypoint_runs_a_script_of_the_examples_on_all_pods(job):
    entrypoint, cluster = job["spec"]["entrypoint"], job["spec"]["rayClusterSpec"]
    script = re.search(r"/opt/megatron_aspo/(examples/run_\S+\.sh)", entrypoint)[1]
    assert (ROOT / script).is_file() and "set -o pipefail" in entrypoint  # otherwise the status would be tee's
    pods = 1 + sum(group["replicas"] for group in cluster["workerGroupSpecs"])
    gpus = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert f"NNODES={pods} GPUS_PER_NODE={gpus} " in entrypoint and "/shared/runs" in entrypoint
    # A failed job holds no GPUs, and a retry resumes from the checkpoint.
    assert job["spec"]["shutdownAfterJobFinishes"] and job["spec"]["backoffLimit"] > 0 and "RESUME" not in entrypoint
