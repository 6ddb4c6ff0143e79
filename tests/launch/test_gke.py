"""The manifests of launch/gke: the API knows their fields, and their numbers fit together.

The API is that of the published models (kubeflow-trainer-api). What GKE writes on every pod of a
TPU slice is written here as its documentation says, and JAX's own detection reads it.
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
    """Fails unless the model knows every field, and every value is of the field's type."""
    # What the model does not know it leaves out, and what is missing it fills in.
    assert model.from_dict(values).to_dict() == values


@pytest.fixture
def job() -> dict:
    """The only job of the set."""
    (found,) = read("jobset.yaml")["spec"]["replicatedJobs"]
    return found


@pytest.fixture
def pod(job) -> dict:
    return job["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("name", MODELS)
def test_the_api_knows_every_field(name):
    check(MODELS[name], read(name))


def test_each_manifest_is_checked():
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
def test_a_wrong_field_would_be_noticed(path, key, value):
    values = read("jobset.yaml")
    place = values
    for step in path:
        place = place[step]
    place[key] = value
    with pytest.raises((AssertionError, ValueError)):
        check(MODELS["jobset.yaml"], values)


def test_the_hosts_have_the_chips_of_the_topology(job, pod):
    hosts = job["template"]["spec"]["parallelism"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert hosts * chips == math.prod(int(side) for side in topology.split("x"))
    assert job["template"]["spec"]["completions"] == hosts
    (shards,) = (arg for arg in container["args"] if arg.startswith("--config.loop.data_shards="))
    assert int(shards.split("=")[1]) % (hosts * job["replicas"]) == 0


def test_the_run_is_written_into_the_volume(pod):
    (container,), (volume,) = pod["containers"], pod["volumes"]
    (mount,) = container["volumeMounts"]
    assert mount["name"] == volume["name"]
    claim = read("volume.yaml")
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    (workdir,) = (arg for arg in container["args"] if arg.startswith("--workdir="))
    assert pathlib.PurePath(workdir.split("=")[1]).is_relative_to(mount["mountPath"])


def test_only_a_mistake_ends_the_run_for_good(job, pod):
    """Exit code 2 (tests/cli/test_train.py); 143 after SIGTERM and crashes start all again."""
    template = job["template"]["spec"]
    (rule,) = template["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {
        "containerName": pod["containers"][0]["name"], "operator": "In", "values": [2],
    }  # fmt: skip
    # The API takes such a rule only with this; and a pod alone cannot join a run again.
    assert pod["restartPolicy"] == "Never" and template["backoffLimit"] == 0
    policy = read("jobset.yaml")["spec"]["failurePolicy"]
    assert policy["maxRestarts"] >= 10
    assert [rule["action"] for rule in policy["rules"]] == ["FailJobSet"]
    assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]


def pods(jobset: dict) -> list[dict[str, str]]:
    """The environment that GKE gives every pod of a set of TPU slices, slice by slice.

    https://cloud.google.com/kubernetes-engine/docs/how-to/tpu-multislice
    """
    name, (job,) = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"]
    slices, hosts = job["replicas"], job["template"]["spec"]["parallelism"]
    environments = []
    for index in range(slices):
        names = [f"{name}-{job['name']}-{index}-{host}.{name}" for host in range(hosts)]
        for host in range(hosts):
            found = {"TPU_WORKER_ID": str(host), "TPU_WORKER_HOSTNAMES": ",".join(names)}
            if slices > 1:
                found |= {
                    "MEGASCALE_NUM_SLICES": str(slices),
                    "MEGASCALE_SLICE_ID": str(index),
                    "MEGASCALE_COORDINATOR_ADDRESS": f"{name}-{job['name']}-0-0.{name}",
                }
            environments.append(found)
    return environments


@pytest.mark.parametrize("slices", [1, 2])
def test_jax_gives_every_pod_its_place(slices, monkeypatch):
    jobset = copy.deepcopy(read("jobset.yaml"))
    jobset["spec"]["replicatedJobs"][0]["replicas"] = slices
    first = "leon-slice-0-0.leon"
    # A host with chips and libtpu; what is not in the environment is not in the metadata either.
    for module in (cluster, cloud_tpu_cluster):
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_tpu_env_value_from_metadata", lambda key: None)
    known = {first: "10.0.0.1"}
    monkeypatch.setattr(socket, "gethostbyname", known.__getitem__)
    environments = pods(jobset)
    found = []
    for environment in environments:
        with monkeypatch.context() as here:
            for key, value in environment.items():
                here.setenv(key, value)
            found.append(clusters.ClusterEnv.auto_detect_unset_distributed_params(*[None] * 5, 1))
    assert len(environments) == 4 * slices
    assert found == [(f"{first}:8482", 4 * slices, number, None) for number in range(4 * slices)]


def test_the_command_gets_as_far_as_its_data(job, pod, tmp_path):
    """Every flag is right on as many simulated devices as a slice has chips; data are missing."""
    (container,) = pod["containers"]
    (slices,) = container["env"]
    value = slices["valueFrom"]["fieldRef"]["fieldPath"]
    assert value == "metadata.annotations['jobset.sigs.k8s.io/replicatedjob-replicas']"
    verb, *flags = (
        word.replace(f"$({slices['name']})", "1").replace("/runs/", f"{tmp_path}/")
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
    done = subprocess.run(
        command, env=os.environ | devices, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert f"{tmp_path}/data" in done.stderr, done.stderr
