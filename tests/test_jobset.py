"""docs/jobset.yaml: its fields against JobSet's and Kubernetes' schemas, its restarts against the table of exit codes.

No cluster runs it here. JobSet's fields are written down below as the API jobset.x-k8s.io/v1alpha2 has them in JobSet
0.10 to 0.12; those of the Job and its pods are checked by kubernetes-validate, which carries Kubernetes' own schemas.
"""

import copy
import re
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from configs import PRESETS
from dsv2_jax import cli
from dsv2_jax.parallel import sharding
from dsv2_jax.training import loop

ROOT = Path(__file__).parent.parent
JOBSET = yaml.safe_load((ROOT / "docs" / "jobset.yaml").read_text(encoding="utf-8"))
KUBERNETES = "1.34"


def record(required: str = "", **fields) -> dict:
    """A JSON schema of an object with these fields and no others."""
    return {
        "type": "object",
        "properties": fields,
        "required": required.split(),
        "additionalProperties": False,
    }


def one_of(*names: str) -> dict:
    return {"enum": list(names)}


def several(kind: dict) -> dict:
    return {"type": "array", "items": kind, "uniqueItems": True}


STRING, BOOL, COUNT = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0}
STRINGS = several(STRING)
NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
RULE = record(
    "name action",
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    action=one_of(
        *("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
        *("RestartJob", "RestartJobAndIgnoreMaxRestarts"),
    ),
    onJobFailureReasons=several(
        one_of(
            *("BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"),
            *("FailedIndexes", "MaxFailedIndexesExceeded"),
        )
    ),
    onJobFailureMessagePatterns=several({"type": "string", "format": "regex"}),
    targetReplicatedJobs=STRINGS,
)
SPEC = record(
    "replicatedJobs",
    replicatedJobs=several(
        record(
            "name template",
            name=NAME,
            groupName=STRING,
            replicas=COUNT,
            template={"type": "object"},
            dependsOn=several(record("name status", name=STRING, status=one_of("Ready", "Complete"))),
        )
    ),
    network=record(enableDNSHostnames=BOOL, subdomain=STRING, publishNotReadyAddresses=BOOL),
    successPolicy=record("operator", operator=one_of("All", "Any"), targetReplicatedJobs=STRINGS),
    failurePolicy=record(
        maxRestarts=COUNT,
        restartStrategy=one_of("Recreate", "BlockingRecreate", "InPlaceRestart"),
        rules={**several(RULE), "maxItems": 20},
    ),
    startupPolicy=record("startupPolicyOrder", startupPolicyOrder=one_of("AnyOrder", "InOrder")),
    suspend=BOOL,
    coordinator=record("replicatedJob", replicatedJob=STRING, jobIndex=COUNT, podIndex=COUNT),
    managedBy=STRING,
    ttlSecondsAfterFinished=COUNT,
    volumeClaimPolicies={"type": "array"},
)
SCHEMA = record(
    "apiVersion kind metadata spec",
    apiVersion=one_of("jobset.x-k8s.io/v1alpha2"),
    kind=one_of("JobSet"),
    metadata=record("name", name=NAME, namespace=NAME, labels={"type": "object"}, annotations={"type": "object"}),
    spec=SPEC,
)


def check(jobset: dict) -> None:
    """Raises the validators' ValidationError where a field is unknown, is missing, or holds what it cannot."""
    jsonschema.validate(jobset, SCHEMA, format_checker=jsonschema.FormatChecker())
    for replicated in jobset["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, **replicated["template"]}
        kubernetes_validate.validate(job, KUBERNETES, strict=True)


def job_spec(jobset: dict = JOBSET) -> dict:
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def pod_spec() -> dict:
    return job_spec()["template"]["spec"]


def container() -> dict:
    (only,) = pod_spec()["containers"]
    return only


def test_every_field_is_one():
    check(JOBSET)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.failurePolicy.maxRestart", 10),
        ("spec.failurePolicy.restartStrategy", "Blocking"),
        ("spec.failurePolicy.rules.0.onJobFailureReasons", ["ExitCode"]),
        ("spec.failurePolicy.rules.0.onJobFailureMessagePatterns", ["("]),
        ("spec.failurePolicy.rules.0.action", "Restart"),
        ("spec.replicatedJobs.0.template.spec.backofLimit", 0),
        ("spec.replicatedJobs.0.template.spec.template.spec.terminationGracePeriodSeconds", "ten"),
        ("spec.replicatedJobs.0.template.spec.template.spec.containers.0.comand", []),
        ("spec.replicatedJobs.0.template.spec.podFailurePolicy.rules.0.onExitCodes.values", ["75"]),
    ],
)
def test_a_field_that_is_none_is_refused(path, value):
    broken = copy.deepcopy(JOBSET)
    *parents, last = path.split(".")
    place = broken
    for name in parents:
        place = place[int(name) if name.isdigit() else name]
    place[last] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(broken)


def test_what_the_controllers_ask_beyond_the_schemas():
    """Refused on a cluster otherwise: a pod failure policy needs Never; names refer to what is there."""
    assert pod_spec()["restartPolicy"] == "Never"
    on_codes, on_conditions = job_spec()["podFailurePolicy"]["rules"]
    assert on_codes["onExitCodes"]["containerName"] == container()["name"]
    assert on_codes["onExitCodes"]["operator"] == "In"
    assert {on_codes["action"], on_conditions["action"]} == {"FailJob"}
    assert {mount["name"] for mount in container()["volumeMounts"]} == {v["name"] for v in pod_spec()["volumes"]}


def after(code: int, condition: str = "") -> str:
    """What the JobSet controller does when a pod ends with this code or under this condition.

    As the Job controller and JobSet's failure policy say: of a pod's rules the first that matches, then of the set's;
    a set without a rule restarts up to maxRestarts. The message is the Job controller's.
    """
    if code == 0:
        return "done"
    policy = JOBSET["spec"]["failurePolicy"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job_spec()["podFailurePolicy"]["rules"]):
        exits, conditions = rule.get("onExitCodes"), rule.get("onPodConditions", ())
        if exits and code in exits["values"]:
            said = f"failed with exit code {code}"
        elif any(condition == wanted["type"] for wanted in conditions):
            said = f"has condition {condition}"
        else:
            continue
        reason, message = (
            "PodFailurePolicy",
            f"Container train for pod a/b {said} matching FailJob rule at index {index}",
        )
        break
    for rule in policy["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return f"RestartJobSet up to {policy['maxRestarts']} times"


@pytest.mark.parametrize(
    ("code", "condition", "outcome"),
    [
        (0, "", "done"),
        (2, "", "FailJobSet"),
        (loop.STOPPED, "", "RestartJobSetAndIgnoreMaxRestarts"),
        (loop.STOPPED, "DisruptionTarget", "RestartJobSetAndIgnoreMaxRestarts"),
        (137, "DisruptionTarget", "RestartJobSetAndIgnoreMaxRestarts"),  # a Spot host that was gone before it saved
        (1, "", "RestartJobSet up to 10 times"),
        (139, "", "RestartJobSet up to 10 times"),
    ],
)
def test_restarts_are_those_of_the_table_of_exit_codes(code, condition, outcome):
    assert job_spec()["backoffLimit"] == 0  # a pod that fails is not started alone
    assert after(code, condition) == outcome


def test_a_pod_may_save_before_it_is_killed():
    """The grace period is that of xpk's recipe on the same page, and no pod of the next attempt starts meanwhile."""
    pods = (ROOT / "docs" / "pods.md").read_text(encoding="utf-8")
    (seconds,) = re.findall(r"--termination-grace-period-seconds=(\d+)", pods)
    assert pod_spec()["terminationGracePeriodSeconds"] == int(seconds)
    assert JOBSET["spec"]["failurePolicy"]["restartStrategy"] == "BlockingRecreate"


def test_the_command_is_read_and_fits_the_chips():
    """The container runs the console command itself, without a shell, and the mesh fits the slice's chips."""
    command, preset = container()["command"]
    assert command == "dsv2-train"
    config = cli.parse(PRESETS[preset](), container()["args"])
    x, y, z = map(int, pod_spec()["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = container()["resources"]["limits"]["google.com/tpu"] * job_spec()["parallelism"]
    assert chips == x * y * z and job_spec()["completions"] == job_spec()["parallelism"]
    mesh = config.mesh.resolve(chips)
    sharding.check_model(config.model, mesh)
    sharding.check_batch(config.batch.micro_size, config.batch.length, config.model, mesh)
    mounts = tuple(mount["mountPath"] + "/" for mount in container()["volumeMounts"])
    for path in (config.workdir, config.data.folder, config.data.source, config.data.tokenizer):
        assert str(path).startswith(mounts)  # nothing is lost with the pod
