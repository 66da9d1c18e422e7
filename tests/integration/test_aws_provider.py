"""`ray up cluster/aws.yaml` through Ray's own AWS provider and autoscaler, against a mocked AWS in this process (moto).

Nothing is contacted: connections to other than loopback addresses fail the test, and so does a call of ssh, scp or rsync.
What Ray would run over SSH goes to a recorder. What is not covered, because it takes a real account: that AWS accepts the
image, the instance types and the interfaces, how it evaluates the policies (here: a small evaluator), and the commands.
"""

from __future__ import annotations

import ast
import copy
import fnmatch
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import moto
import pytest
import yaml
from botocore.client import BaseClient

# The one resource of the template that moto's CloudFormation does not know; cfn-lint does.
pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore:Tried to parse AWS..EC2..SecurityGroupEgress")]

ROOT = Path(__file__).resolve().parents[2]
REGION = "us-west-2"
HOME_ADDRESS = "203.0.113.7/32"
BUCKET = "some-bucket"
ACCOUNT = "123456789012"
_INSTANCE_TYPES: list[dict[str, Any]] = []
_FOR_THE_HEAD = "/ray_bootstrap_config.yaml"


@dataclass
class Calls:
    """What was asked of AWS, of the shell and of the network."""

    aws: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """('ec2:RunInstances', its parameters)."""
    commands: list[str] = field(default_factory=list)
    """What Ray's command runner was given."""
    connections: list[Any] = field(default_factory=list)
    image: str = ""
    """The account's only image."""
    for_the_head: str = ""
    """The file that the head's autoscaler would read."""

    def of(self, action: str) -> list[dict[str, Any]]:
        return [parameters for name, parameters in self.aws if name == action]


class Recorder:
    """In the place of `subprocess` in Ray's command runner."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def check_call(self, command: list[str], *args: Any, **kwargs: Any) -> int:
        self._calls.commands.append(" ".join(command))
        if command[-1].endswith(_FOR_THE_HEAD):
            self._calls.for_the_head = Path(command[-2]).read_text(encoding="utf-8")
        return 0

    def check_output(self, command: list[str], *args: Any, **kwargs: Any) -> bytes:
        self._calls.commands.append(" ".join(command))
        return b""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """A mocked AWS in a fresh home, without network, where every request is written down."""
    from ray.autoscaler._private import command_runner
    from ray.autoscaler._private.aws import config as aws_config
    from ray.autoscaler._private.aws import node_provider, utils

    calls = Calls()
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text("token")
    shims = tmp_path / "shims"
    shims.mkdir()
    for name in ("ssh", "scp", "rsync", "docker"):
        (shims / name).write_text(f"#!/bin/sh\necho {name} $@ >> {tmp_path}/shim_calls\nexit 1\n")
        (shims / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{shims}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    monkeypatch.setattr("moto.settings.ENABLE_AMI_VALIDATION", True)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "RAY_UP_enable_autoscaler_v2"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(ROOT)

    def refuse(own: Callable[..., Any]) -> Callable[..., Any]:
        def connect(self: socket.socket, address: Any, *args: Any) -> Any:
            if self.family != socket.AF_UNIX and not str(address[0]).startswith(("127.", "::1", "localhost")):
                calls.connections.append(address)
                raise OSError(f"this test connects to nothing, but {address} was asked for")
            return own(self, address, *args)

        return connect

    monkeypatch.setattr(socket.socket, "connect", refuse(socket.socket.connect))
    monkeypatch.setattr(socket.socket, "connect_ex", refuse(socket.socket.connect_ex))

    own_call = BaseClient._make_api_call

    def api_call(self: Any, operation: str, parameters: dict[str, Any]) -> Any:
        calls.aws.append((f"{self.meta.service_model.service_name}:{operation}", copy.deepcopy(parameters)))
        return own_call(self, operation, parameters)

    monkeypatch.setattr(BaseClient, "_make_api_call", api_call)
    recorder = Recorder(calls)
    monkeypatch.setattr(command_runner, "run_cmd_redirected", lambda command, **_: recorder.check_call(command))
    # A batch of tags is waited for a second, to spare requests; there is nothing to spare here. And moto takes seconds
    # to list its thousand instance types: once is enough.
    monkeypatch.setattr(node_provider, "TAG_BATCH_DELAY", 0.05)
    own_list = node_provider.list_ec2_instances

    def list_once(*args: Any) -> list[dict[str, Any]]:
        if not _INSTANCE_TYPES:
            _INSTANCE_TYPES.extend(own_list(*args))
        return _INSTANCE_TYPES

    monkeypatch.setattr(node_provider, "list_ec2_instances", list_once)
    caches = (utils.resource_cache, utils.client_cache, aws_config._get_subnets_or_die)
    for cache in caches:
        cache.cache_clear()
    with moto.mock_aws():
        yield calls
    for cache in caches:
        cache.cache_clear()
    assert calls.connections == []
    assert not (tmp_path / "shim_calls").exists(), (tmp_path / "shim_calls").read_text()


@pytest.fixture
def group(calls: Calls) -> str:
    """The account as cluster/aws-account.yaml leaves it; returns the security group's id."""
    formation, ec2 = boto3.client("cloudformation"), boto3.client("ec2")
    parameters = {"Bucket": BUCKET, "Vpc": ec2.describe_vpcs()["Vpcs"][0]["VpcId"], "SshFrom": HOME_ADDRESS}
    formation.create_stack(
        StackName="ctrl-ray",
        TemplateBody=(ROOT / "cluster" / "aws-account.yaml").read_text(encoding="utf-8"),
        Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()],
        Capabilities=["CAPABILITY_NAMED_IAM"],
    )
    (stack,) = formation.describe_stacks(StackName="ctrl-ray")["Stacks"]
    assert stack["StackStatus"] == "CREATE_COMPLETE"
    (output,) = stack["Outputs"]
    calls.image = ec2.register_image(Name="ours", RootDeviceName="/dev/sda1")["ImageId"]
    calls.aws.clear()
    return output["OutputValue"]


def _filled(calls: Calls, group: str, text: str | None = None) -> dict[str, Any]:
    """The file with its placeholders replaced."""
    text = text or (ROOT / "cluster" / "aws.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text.replace("ami-REPLACE-ME", calls.image).replace("sg-REPLACE-ME", group))


def _bootstrapped(config: dict[str, Any]) -> dict[str, Any]:
    """Ray's own way from the file to what it sends: defaults, resources, schema, then key pair, subnets, groups."""
    from ray.autoscaler._private.commands import _bootstrap_config

    return _bootstrap_config(config, no_config_cache=True)


def _instances() -> dict[str, dict[str, Any]]:
    """Instances that are not terminated, by the type that aws.yaml gives them."""
    found = {}
    for reservation in boto3.client("ec2").describe_instances()["Reservations"]:
        for instance in reservation["Instances"]:
            if instance["State"]["Name"] in ("pending", "running"):
                tags = {tag["Key"]: tag["Value"] for tag in instance["Tags"]}
                found[tags["ray-user-node-type"]] = {**instance, "Tags": tags}
    return found


def _wait(condition: Callable[[], bool], errors: Callable[[], list[Any]], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert errors() == []
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


# -- the file


def test_ray_up_starts_the_head_and_its_autoscaler_starts_and_ends_workers(calls: Calls, group: str) -> None:
    from ray.autoscaler._private.commands import get_or_create_head_node
    from ray.autoscaler._private.providers import _get_node_provider
    from ray.autoscaler.v2.instance_manager.config import FileConfigReader
    from ray.autoscaler.v2.instance_manager.node_provider import NodeProviderAdapter
    from ray.autoscaler.v2.instance_manager.ray_installer import RayInstaller
    from ray.core.generated.instance_manager_pb2 import Instance

    config = _bootstrapped(_filled(calls, group))
    types = config["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 8, "GPU": 0, "driver": 100}
    for name in ("gpu_worker_spot", "gpu_worker_on_demand"):
        resources = types[name]["resources"]
        assert (resources["CPU"], resources["GPU"], resources["accelerator_type:A10G"]) == (8, 1, 1)
    # Two zones of one network, in the order of the file.
    zones = {s["SubnetId"]: s for s in boto3.client("ec2").describe_subnets()["Subnets"]}
    for node in types.values():
        assert [zones[s]["AvailabilityZone"] for s in node["node_config"]["SubnetIds"]] == ["us-west-2a", "us-west-2b"]
    assert not calls.of("iam:CreateRole") and not calls.of("ec2:CreateSecurityGroup")

    # The user's machine: the head.
    provider = _get_node_provider(config["provider"], config["cluster_name"])
    recorder = Recorder(calls)
    get_or_create_head_node(config, "aws.yaml", False, False, True, None, _provider=provider, _runner=recorder)
    head = _instances()["head"]
    assert _instances().keys() == {"head"}
    assert (
        head["Tags"].items()
        >= {
            "ray-cluster-name": "ctrl-ray",
            "ray-node-type": "head",
            "ray-node-status": "up-to-date",
            "Name": "ray-ctrl-ray-head",
        }.items()
    )
    assert (head["InstanceType"], head["ImageId"]) == ("m6i.2xlarge", calls.image)
    assert [g["GroupId"] for g in head["SecurityGroups"]] == [group]
    assert head["IamInstanceProfile"]["Arn"].endswith("/ctrl-ray-head")
    assert "SpotInstanceRequestId" not in head
    (sent,) = calls.of("ec2:RunInstances")
    assert sent["MetadataOptions"]["HttpTokens"] == "required"
    assert "InstanceMarketOptions" not in sent
    assert (sent["MinCount"], sent["MaxCount"]) == (1, 1)
    _check_head_commands(calls.commands)

    # The head's autoscaler: one worker of each kind, from the file that was sent to the head.
    home = Path(os.environ["HOME"])
    (home / "ctrl_ray").mkdir()
    for name in ("ctrl_ray/pyproject.toml", "spot-watch.sh", "versions.txt", "ray_bootstrap_key.pem"):
        (home / name).write_text("as the head got it")
    (home / "ray_bootstrap_config.yaml").write_text(calls.for_the_head)
    reader = FileConfigReader(str(home / "ray_bootstrap_config.yaml"), skip_content_hash=False)
    autoscaler = NodeProviderAdapter(
        _get_node_provider(config["provider"], config["cluster_name"]), reader, max_launch_batch_per_type=1
    )
    calls.aws.clear()
    autoscaler.launch({"gpu_worker_spot": 1, "gpu_worker_on_demand": 1}, request_id="r1")
    _wait(lambda: len(_instances()) == 3, autoscaler.poll_errors)
    spot, on_demand = _instances()["gpu_worker_spot"], _instances()["gpu_worker_on_demand"]
    for node in (spot, on_demand):
        assert node["InstanceType"] == "g5.2xlarge"
        assert node["IamInstanceProfile"]["Arn"].endswith("/ctrl-ray-worker")
        assert [g["GroupId"] for g in node["SecurityGroups"]] == [group]
        assert node["Tags"].items() >= {"ray-cluster-name": "ctrl-ray", "ray-launch-request": "r1"}.items()
    by_type = {
        tag["Value"]: parameters
        for parameters in calls.of("ec2:RunInstances")
        for tag in parameters["TagSpecifications"][0]["Tags"]
        if tag["Key"] == "ray-user-node-type"
    }
    assert by_type["gpu_worker_spot"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in by_type["gpu_worker_on_demand"]

    # The autoscaler looks before it installs, in every round.
    assert autoscaler.get_non_terminated().keys() == {n["InstanceId"] for n in _instances().values()}
    calls.commands.clear()
    RayInstaller(autoscaler.v1_provider, reader.get_cached_autoscaling_config(), recorder).install_ray(
        Instance(instance_type="gpu_worker_spot", cloud_instance_id=spot["InstanceId"]), head["PrivateIpAddress"]
    )
    _check_worker_commands(calls.commands, head["PrivateIpAddress"])
    assert _instances()["gpu_worker_spot"]["Tags"]["ray-node-status"] == "up-to-date"

    autoscaler.terminate([spot["InstanceId"], on_demand["InstanceId"]], request_id="r2")
    _wait(lambda: _instances().keys() == {"head"}, autoscaler.poll_errors)
    assert not calls.of("ec2:StopInstances")  # terminated, not stopped: a stopped disk costs money
    assert autoscaler.poll_errors() == []

    # All of that, as the head's role: allowed, and nothing in the role that it did not take.
    # (This test's own looks have no filters.)
    taken = [(action, p) for action, p in calls.aws if action != "ec2:DescribeInstances" or "Filters" in p]
    policy = _autoscaler_policy()
    for action, parameters in taken:
        if action == "ec2:DescribeInstances":
            assert _allows(policy, action, "*", {})
        elif action == "ec2:RunInstances":
            _check_launch_is_allowed(policy, parameters, group)
        else:
            assert action in ("ec2:CreateTags", "ec2:TerminateInstances"), action
            for instance in parameters.get("Resources", parameters.get("InstanceIds")):
                assert _allows(policy, action, _arn(f"instance/{instance}"), _tagged("ctrl-ray"))
    granted = {action for statement in policy for action in _list(statement["Action"])}
    assert granted == {action for action, _ in taken} | {"iam:PassRole"}  # the last is part of RunInstances

    provider.terminate_nodes([head["InstanceId"]])
    assert _instances() == {}


def _check_head_commands(commands: list[str]) -> None:
    """What the head would be told over SSH, by the recorder: files, then setup, then Ray with the autoscaler."""
    assert all(command.startswith(("ssh ", "rsync ", "scp ")) for command in commands)
    text = "\n".join(commands)
    for mounted in ("/ctrl_ray/", "~/spot-watch.sh", "~/.ray/auth_token", "~/ray_bootstrap_config.yaml"):
        assert any(c.startswith("rsync") and mounted in c for c in commands), mounted
    assert "pip freeze --exclude ctrl-ray > ~/versions.txt" in text
    (start,) = [command for command in commands if "ray start --head" in command]
    assert "RAY_enable_autoscaler_v2=1" in start and "--dashboard-host=127.0.0.1" in start
    assert '"driver":100' in start.replace("\\", "")
    assert "0.0.0.0" not in text


def _check_worker_commands(commands: list[str], head_address: str) -> None:
    text = "\n".join(commands)
    assert "pip install --quiet --constraint ~/versions.txt ~/ctrl_ray" in text
    (start,) = [command for command in commands if "ray start --address" in command]
    assert f"RAY_HEAD_IP={head_address}" in start
    order = ["ray start --address", "setsid --fork bash ~/spot-watch.sh"]
    at = [next(i for i, command in enumerate(commands) if part in command) for part in order]
    assert at == sorted(at) and at[0] < at[1]


@pytest.mark.parametrize("left", ["sg-REPLACE-ME", "ami-REPLACE-ME"])
def test_a_placeholder_that_was_left_stops_it_before_anything_runs(
    calls: Calls, group: str, left: str, capfd: pytest.CaptureFixture[str]
) -> None:
    from ray.autoscaler._private.commands import get_or_create_head_node
    from ray.autoscaler._private.providers import _get_node_provider
    from ray.autoscaler.node_launch_exception import NodeLaunchException

    text = (ROOT / "cluster" / "aws.yaml").read_text(encoding="utf-8")
    kept = text.replace(left, "KEEP")
    kept = kept.replace("ami-REPLACE-ME", calls.image).replace("sg-REPLACE-ME", group).replace("KEEP", left)
    with pytest.raises((AssertionError, NodeLaunchException)):
        config = _bootstrapped(yaml.safe_load(kept))
        provider = _get_node_provider(config["provider"], config["cluster_name"])
        get_or_create_head_node(config, "f", False, False, True, None, _provider=provider, _runner=Recorder(calls))
    assert _instances() == {}
    assert calls.commands == []
    says = {"sg-REPLACE-ME": "Failed to detect a security group", "ami-REPLACE-ME": "'[ami-REPLACE-ME]' does not exist"}
    printed = capfd.readouterr()
    assert says[left] in printed.out + printed.err


def test_the_commented_choice_of_efa_is_accepted_by_the_provider(calls: Calls, group: str) -> None:
    from ray.autoscaler._private.providers import _get_node_provider

    lines = (ROOT / "cluster" / "aws.yaml").read_text(encoding="utf-8").splitlines()
    start = lines.index("  # gpu_worker_efa:")
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("  # "))
    lines[start:end] = ["  " + line.removeprefix("  # ") for line in lines[start:end]]
    (subnet, *_) = boto3.client("ec2").describe_subnets(
        Filters=[{"Name": "availability-zone", "Values": ["us-west-2a"]}]
    )["Subnets"]
    text = "\n".join(lines).replace("subnet-REPLACE-ME", subnet["SubnetId"])
    config = _bootstrapped(_filled(calls, group, text))
    efa = config["available_node_types"]["gpu_worker_efa"]
    assert (efa["resources"]["CPU"], efa["resources"]["GPU"]) == (96, 8)
    calls.aws.clear()
    provider = _get_node_provider(config["provider"], config["cluster_name"])
    provider.create_node(efa["node_config"], {"ray-node-type": "worker", "ray-user-node-type": "gpu_worker_efa"}, 1)
    (sent,) = calls.of("ec2:RunInstances")
    (interface,) = sent["NetworkInterfaces"]
    assert (interface["InterfaceType"], interface["Groups"]) == ("efa", [group])
    assert _instances()["gpu_worker_efa"]["InstanceType"] == "p4d.24xlarge"


def test_spot_is_asked_for_first_and_on_demand_only_where_the_user_wants_it(calls: Calls, group: str) -> None:
    """Ray's own scheduler (autoscaler v2), both types at 8: priorities decide, not the order of names or chance."""
    config = _bootstrapped(_filled(calls, group))
    config.pop("head_node")
    assert _asked_for(config) == {"gpu_worker_spot": 3}
    types = config["available_node_types"]
    types["gpu_worker_on_demand"]["max_workers"] = 8
    assert _asked_for(config) == {"gpu_worker_spot": 3}
    types["gpu_worker_on_demand"]["priority"] = 2  # what the file says to do when there is no spot capacity
    assert _asked_for(config) == {"gpu_worker_on_demand": 3}


def _asked_for(config: dict[str, Any], workers: int = 3) -> dict[str, int]:
    """Node types that the autoscaler asks AWS for when that many workers of the preset wait on an empty cluster."""
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    from ray.autoscaler.v2.event_logger import AutoscalerEventLogger  # isort: skip

    class Silent(AutoscalerEventLogger):
        def __init__(self) -> None: ...

        def log_cluster_scheduling_update(self, *args: Any, **kwargs: Any) -> None: ...

    read = AutoscalingConfig(copy.deepcopy(config), skip_content_hash=True)
    wanted = [ResourceRequestUtil.make({"GPU": 1, "CPU": 4})] * workers
    reply = ResourceDemandScheduler(Silent()).schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=read.get_node_type_configs(),
            max_num_nodes=read.get_max_num_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count(wanted),
        )
    )
    asked = {request.instance_type: request.count for request in reply.to_launch}
    asked.pop("head", None)
    return asked


# -- the account


def test_ssh_is_open_to_the_users_address_only(calls: Calls, group: str) -> None:
    _bootstrapped(_filled(calls, group))
    (found,) = boto3.client("ec2").describe_security_groups(GroupIds=[group])["SecurityGroups"]
    rules = found["IpPermissions"]
    (ssh,) = [rule for rule in rules if rule["IpProtocol"] != "-1"]
    assert (ssh["FromPort"], ssh["ToPort"], ssh["IpRanges"][0]["CidrIp"]) == (22, 22, HOME_ADDRESS)
    assert len(ssh["IpRanges"]) == 1 and not ssh["Ipv6Ranges"] and not ssh["UserIdGroupPairs"]
    (inside,) = [rule for rule in rules if rule["IpProtocol"] == "-1"]
    assert [pair["GroupId"] for pair in inside["UserIdGroupPairs"]] == [group]
    assert not inside["IpRanges"] and not inside["Ipv6Ranges"]


def test_a_group_left_to_ray_would_be_open_to_the_world(calls: Calls, group: str) -> None:
    """Why the file names a group: Ray adds its own SSH rule to those of provider.security_group. If this fails, Ray has
    changed, and the file may become simpler."""
    config = _filled(calls, group)
    for node in config["available_node_types"].values():
        del node["node_config"]["SecurityGroupIds"]
    ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": HOME_ADDRESS}]}
    config["provider"]["security_group"] = {"GroupName": "left-to-ray", "IpPermissions": [ssh]}
    left = _bootstrapped(config)["available_node_types"]["head"]["node_config"]["SecurityGroupIds"]
    (found,) = boto3.client("ec2").describe_security_groups(GroupIds=left)["SecurityGroups"]
    ranges = {entry["CidrIp"] for rule in found["IpPermissions"] for entry in rule["IpRanges"]}
    assert ranges == {HOME_ADDRESS, "0.0.0.0/0"}


def test_roles_have_what_the_template_gives_and_no_more(calls: Calls, group: str) -> None:
    iam = boto3.client("iam")
    results = [f"arn:aws:s3:::{BUCKET}", f"arn:aws:s3:::{BUCKET}/*"]
    for role, inline in (("ctrl-ray-head", ["autoscaler"]), ("ctrl-ray-worker", [])):
        assert iam.list_role_policies(RoleName=role)["PolicyNames"] == inline
        (attached,) = iam.list_attached_role_policies(RoleName=role)["AttachedPolicies"]
        arn = attached["PolicyArn"]
        version = iam.get_policy(PolicyArn=arn)["Policy"]["DefaultVersionId"]
        document = _document(iam.get_policy_version(PolicyArn=arn, VersionId=version)["PolicyVersion"]["Document"])
        assert [statement["Resource"] for statement in document["Statement"]] == results
        assert all(a.startswith("s3:") and "*" not in a for s in document["Statement"] for a in _list(s["Action"]))
        (profile,) = iam.list_instance_profiles_for_role(RoleName=role)["InstanceProfiles"]
        assert profile["InstanceProfileName"] == role


def test_the_heads_role_refuses_what_is_not_its_business(calls: Calls, group: str) -> None:
    policy = _autoscaler_policy()
    instance, tag = _arn("instance/i-1"), "aws:RequestTag/ray-cluster-name"
    good = {tag: "ctrl-ray", "ec2:MetadataHttpTokens": "required", "ec2:InstanceProfile": _profile("ctrl-ray-worker")}
    assert _allows(policy, "ec2:RunInstances", instance, good)
    for key, bad in (
        (tag, "another-cluster"),
        ("ec2:MetadataHttpTokens", "optional"),
        ("ec2:InstanceProfile", _profile("ctrl-ray-head")),
    ):
        assert not _allows(policy, "ec2:RunInstances", instance, {**good, key: bad}), key
        assert not _allows(policy, "ec2:RunInstances", instance, {k: v for k, v in good.items() if k != key}), key
    assert not _allows(policy, "ec2:RunInstances", _arn("security-group/sg-0other"), {})
    for action in ("ec2:TerminateInstances", "ec2:CreateTags"):
        assert _allows(policy, action, instance, _tagged("ctrl-ray"))
        assert not _allows(policy, action, instance, _tagged("another-cluster"))
        assert not _allows(policy, action, instance, {})
    to_ec2 = {"iam:PassedToService": "ec2.amazonaws.com"}
    assert _allows(policy, "iam:PassRole", f"arn:aws:iam::{ACCOUNT}:role/ctrl-ray-worker", to_ec2)
    assert not _allows(policy, "iam:PassRole", f"arn:aws:iam::{ACCOUNT}:role/ctrl-ray-head", to_ec2)
    assert not _allows(policy, "iam:PassRole", f"arn:aws:iam::{ACCOUNT}:role/ctrl-ray-worker", {})
    for action in ("ec2:AuthorizeSecurityGroupIngress", "ec2:ModifyInstanceAttribute", "iam:CreateRole"):
        assert not _allows(policy, action, "*", {**good, **_tagged("ctrl-ray")})


def test_aws_knows_every_word_of_the_template() -> None:
    """cfn-lint holds AWS's own resource schemas, and needs no network for them."""
    done = subprocess.run(
        ["cfn-lint", "--format", "parseable", str(ROOT / "cluster" / "aws-account.yaml")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


# -- a small evaluator of policies: allow statements only, and the operators that the template uses


def _autoscaler_policy() -> list[dict[str, Any]]:
    found = boto3.client("iam").get_role_policy(RoleName="ctrl-ray-head", PolicyName="autoscaler")
    return _document(found["PolicyDocument"])["Statement"]


def _document(value: Any) -> dict[str, Any]:
    """moto gives back what CloudFormation made as text, inline policies in Python's spelling."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return ast.literal_eval(value)


def _allows(statements: list[dict[str, Any]], action: str, resource: str, context: dict[str, str]) -> bool:
    return any(
        action in _list(statement["Action"])
        and any(fnmatch.fnmatchcase(resource, pattern) for pattern in _list(statement["Resource"]))
        and all(_holds(operator, asked, context) for operator, asked in statement.get("Condition", {}).items())
        for statement in statements
    )


def _holds(operator: str, asked: dict[str, str], context: dict[str, str]) -> bool:
    assert operator in ("StringEquals", "ArnEquals"), operator
    return all(context.get(key) == value for key, value in asked.items())


def _check_launch_is_allowed(policy: list[dict[str, Any]], sent: dict[str, Any], group: str) -> None:
    """Everything that AWS checks for a RunInstances: the instance, what goes into it, its first tags, its role."""
    tags = {tag["Key"]: tag["Value"] for tag in sent["TagSpecifications"][0]["Tags"]}
    launched = {"aws:RequestTag/ray-cluster-name": tags["ray-cluster-name"]}
    options = {
        **launched,
        "ec2:MetadataHttpTokens": sent["MetadataOptions"]["HttpTokens"],
        "ec2:InstanceProfile": _profile(sent["IamInstanceProfile"]["Name"]),
    }
    assert _allows(policy, "ec2:RunInstances", _arn("instance/i-new"), options)
    assert sent["SecurityGroupIds"] == [group]
    uses = [f"security-group/{group}", f"key-pair/{sent['KeyName']}", f"subnet/{sent['SubnetId']}"]
    uses += ["network-interface/eni-new", "volume/vol-new"]
    uses += ["spot-instances-request/sir-new"] if "InstanceMarketOptions" in sent else []
    for use in uses:
        assert _allows(policy, "ec2:RunInstances", _arn(use), {}), use
    assert _allows(policy, "ec2:RunInstances", f"arn:aws:ec2:{REGION}::image/{sent['ImageId']}", {})
    assert _allows(policy, "ec2:CreateTags", _arn("instance/i-new"), {**launched, "ec2:CreateAction": "RunInstances"})
    role = f"arn:aws:iam::{ACCOUNT}:role/{sent['IamInstanceProfile']['Name']}"
    assert _allows(policy, "iam:PassRole", role, {"iam:PassedToService": "ec2.amazonaws.com"})


def _arn(resource: str) -> str:
    return f"arn:aws:ec2:{REGION}:{ACCOUNT}:{resource}"


def _profile(name: str) -> str:
    return f"arn:aws:iam::{ACCOUNT}:instance-profile/{name}"


def _tagged(cluster: str) -> dict[str, str]:
    return {"aws:ResourceTag/ray-cluster-name": cluster}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
