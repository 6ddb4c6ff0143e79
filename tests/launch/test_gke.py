"""Tests the manifests of launch/gke: all fields are valid, and the numbers are consistent.

The published models of the API (kubeflow-trainer-api) validate the fields. The environment that
GKE sets in the pods of a TPU slice follows its documentation, and JAX's own detection reads it.
"""

import copy
import math
import os
import pathlib
import socket
import subprocess
import sys

import pytest
import yaml
from jax._src import clusters
from jax._src.clusters import cloud_tpu_cluster, cluster
from kubeflow_trainer_api import models

ROOT = pathlib.Path(__file__).parents[2]
GKE = ROOT / "launch" / "gke"
MODELS = {
    "jobset.yaml": models.JobsetV1alpha2JobSet,
    "volume.yaml": models.IoK8sApiCoreV1PersistentVolumeClaim,
}


def read(name: str) -> dict:
    return yaml.safe_load((GKE / name).read_text())


def check(model: type, values: dict) -> None:
    """Fails if a field is unknown or a value has the wrong type."""
    # The model drops unknown fields and adds missing ones.
    assert model.from_dict(values).to_dict() == values


@pytest.fixture
def job() -> dict:
    """Returns the only job of the set."""
    (replicated_job,) = read("jobset.yaml")["spec"]["replicatedJobs"]
    return replicated_job


@pytest.fixture
def pod(job) -> dict:
    return job["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("name", MODELS)
def test_all_fields_are_valid(name):
    check(MODELS[name], read(name))


def test_all_manifests_are_checked():
    assert {path.name for path in GKE.iterdir()} == set(MODELS)


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        (("spec",), "failurePolice", {}),
        (("spec", "replicatedJobs", 0), "replicas", "1"),
        (("spec", "replicatedJobs", 0, "template", "spec"), "backOffLimit", 0),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec"), "volume", []),
    ],
)
def test_an_invalid_field_is_detected(path, key, value):
    values = read("jobset.yaml")
    parent = values
    for part in path:
        parent = parent[part]
    parent[key] = value
    with pytest.raises((AssertionError, ValueError)):
        check(MODELS["jobset.yaml"], values)


def test_hosts_times_chips_equals_the_topology(job, pod):
    hosts = job["template"]["spec"]["parallelism"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert hosts * chips == math.prod(int(side) for side in topology.split("x"))
    assert job["template"]["spec"]["completions"] == hosts
    (shards,) = (arg for arg in container["args"] if arg.startswith("--config.loop.data_shards="))
    assert int(shards.split("=")[1]) % (hosts * job["replicas"]) == 0


def test_the_workdir_is_in_a_bucket_or_in_the_volume(job):
    """The lines in comments are those for the volume."""
    text = (GKE / "jobset.yaml").read_text()
    for line in ("volumeMounts: [", "volumes: ["):
        text = text.replace(f"# {line}", line)
    (replicated_job,) = yaml.safe_load(text)["spec"]["replicatedJobs"]
    pod = replicated_job["template"]["spec"]["template"]["spec"]
    check(MODELS["jobset.yaml"], yaml.safe_load(text))
    (container,), (volume,) = pod["containers"], pod["volumes"]
    (mount,) = container["volumeMounts"]
    assert mount == {"name": volume["name"], "mountPath": "/runs"}
    claim = read("volume.yaml")
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    (workdir,) = (arg for arg in container["args"] if arg.startswith("--workdir="))
    assert workdir.startswith("--workdir=gs://")


def test_a_restart_is_the_next_attempt_of_the_same_run(pod):
    (container,) = pod["containers"]
    paths = {each["name"]: each["valueFrom"]["fieldRef"]["fieldPath"] for each in container["env"]}
    assert paths["LEON_RUN"] == "metadata.annotations['jobset.sigs.k8s.io/jobset-uid']"
    assert paths["LEON_ATTEMPT"] == "metadata.annotations['jobset.sigs.k8s.io/restart-attempt']"


def test_only_exit_code_2_ends_the_run(job, pod):
    """Exit code 2 is a mistake (tests/cli/test_train.py); 143 after SIGTERM and crashes restart."""
    template = job["template"]["spec"]
    (rule,) = template["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {
        "containerName": pod["containers"][0]["name"], "operator": "In", "values": [2],
    }  # fmt: skip
    # The API requires these values for such a rule, and a single pod cannot rejoin a run.
    assert pod["restartPolicy"] == "Never" and template["backoffLimit"] == 0
    policy = read("jobset.yaml")["spec"]["failurePolicy"]
    assert policy["maxRestarts"] >= 10
    assert [rule["action"] for rule in policy["rules"]] == ["FailJobSet"]
    assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]


def pods(jobset: dict) -> list[dict[str, str]]:
    """Returns the environment that GKE sets in each pod of the TPU slices, slice by slice.

    https://cloud.google.com/kubernetes-engine/docs/how-to/tpu-multislice
    """
    name, (job,) = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"]
    slices, hosts = job["replicas"], job["template"]["spec"]["parallelism"]
    environments = []
    for index in range(slices):
        names = [f"{name}-{job['name']}-{index}-{host}.{name}" for host in range(hosts)]
        for host in range(hosts):
            environment = {"TPU_WORKER_ID": str(host), "TPU_WORKER_HOSTNAMES": ",".join(names)}
            if slices > 1:
                environment |= {
                    "MEGASCALE_NUM_SLICES": str(slices),
                    "MEGASCALE_SLICE_ID": str(index),
                    "MEGASCALE_COORDINATOR_ADDRESS": f"{name}-{job['name']}-0-0.{name}",
                }
            environments.append(environment)
    return environments


@pytest.mark.parametrize("slices", [1, 2])
def test_jax_detects_the_process_index_of_every_pod(slices, monkeypatch):
    jobset = copy.deepcopy(read("jobset.yaml"))
    jobset["spec"]["replicatedJobs"][0]["replicas"] = slices
    first = "leon-slice-0-0.leon"
    # A host with chips and libtpu, whose metadata has no more values than the environment.
    for module in (cluster, cloud_tpu_cluster):
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_tpu_env_value_from_metadata", lambda key: None)
    addresses = {first: "10.0.0.1"}
    monkeypatch.setattr(socket, "gethostbyname", addresses.__getitem__)
    environments = pods(jobset)
    detected = []
    for environment in environments:
        with monkeypatch.context() as patch:
            for key, value in environment.items():
                patch.setenv(key, value)
            parameters = clusters.ClusterEnv.auto_detect_unset_distributed_params(*[None] * 5, 1)
            detected.append(parameters)
    assert len(environments) == 4 * slices
    assert detected == [(f"{first}:8482", 4 * slices, index, None) for index in range(4 * slices)]


def test_the_command_is_valid_up_to_the_missing_data(job, pod, tmp_path):
    """The command runs with as many simulated devices as a slice has chips."""
    (container,) = pod["containers"]
    slices = container["env"][0]
    value = slices["valueFrom"]["fieldRef"]["fieldPath"]
    assert value == "metadata.annotations['jobset.sigs.k8s.io/replicatedjob-replicas']"
    verb, *flags = (
        word.replace(f"$({slices['name']})", "1").replace("gs://BUCKET/", f"{tmp_path}/")
        for word in container["args"]
    )
    flags.remove("--distributed")
    hosts = job["template"]["spec"]["parallelism"]
    chips = hosts * container["resources"]["limits"]["google.com/tpu"]
    devices = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={chips}",
    }
    command = [sys.executable, "-m", "leon_jax.cli.main", verb, *flags]
    result = subprocess.run(
        command, env=os.environ | devices, cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2, result.stderr
    assert f"{tmp_path}/data" in result.stderr, result.stderr
