"""The cluster: its description, the notice of a spot machine, and commands that are submitted to it."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import unit
from moto.server import ThreadedMotoServer
from ray.job_submission import JobDetails, JobStatus, JobType
from test_cli import ask, line_of

from selective_ray import in_memory
from selective_ray.actors import check, interruption, submission
from selective_ray.errors import UserError
from selective_ray.lease import Lease
from selective_ray.store import Run

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def described():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_the_description_fits_rays_schema(described):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(described))
    types = described["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in types["head"]["node_config"]
    workers = [kind for name, kind in types.items() if name != "head"]
    assert len(workers) == 3
    for kind in workers:
        assert kind["min_workers"] == 0 < kind["max_workers"]
        assert kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert kind["node_config"]["IamInstanceProfile"] == {"Name": "selective-ray-worker"}
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
    assert described["provider"]["use_internal_ips"]


def test_the_launcher_takes_it_against_a_stand_in_for_ec2(described, tmp_path, monkeypatch):
    import boto3
    from ray.autoscaler._private.aws import config as of_aws
    from ray.autoscaler._private.aws import utils
    from ray.autoscaler._private.util import prepare_config

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    for key, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    for cached in (utils.resource_cache, utils.client_cache):
        cached.cache_clear()
    try:
        ec2 = boto3.resource("ec2")
        (vpc,) = ec2.vpcs.all()
        group = ec2.create_security_group(GroupName="selective-ray", Description="x", VpcId=vpc.id)
        group.authorize_ingress(
            IpPermissions=[{"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group.id}]}]
        )
        ready = of_aws.bootstrap_aws(prepare_config(described))
        for name, kind in ready["available_node_types"].items():
            made = kind["node_config"]
            assert made["SecurityGroupIds"] == [group.id] and made["SubnetIds"], name
            assert made["KeyName"].startswith("ray-autoscaler")
        group.reload()
        # The launcher opens port 22 to all where it makes the group itself.
        assert [rule.get("FromPort") for rule in group.ip_permissions] == [None]
    finally:
        server.stop()
        for cached in (utils.resource_cache, utils.client_cache):
            cached.cache_clear()


def test_policies_name_what_the_code_calls():
    head, worker = (
        json.loads((ROOT / "docs" / f"iam-{name}.json").read_text()) for name in ("head", "worker")
    )
    assert all(part in head["Statement"] for part in worker["Statement"])
    actions = {action for part in worker["Statement"] for action in part["Action"]}
    assert {action.split(":")[0] for action in actions} == {"s3"}


@contextmanager
def metadata_service(answers):
    """A metadata service that wants a token, and gives these answers about interruption, the last again."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status, body=""):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def do_PUT(self):
            assert self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
            self.answer(200, "secret")

        def do_GET(self):
            if self.headers["X-aws-ec2-metadata-token"] != "secret":
                return self.answer(401)
            assert self.path == "/latest/meta-data/spot/instance-action"
            asked.append(self.path)
            return self.answer(*answers[min(len(asked), len(answers)) - 1])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def notice(seconds=120):
    at = (datetime.now(UTC) + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")
    return 200, json.dumps({"action": "terminate", "time": at})


def test_a_notice_is_seen_and_drains_once(monkeypatch):
    drained = []
    monkeypatch.setattr(interruption, "drain", lambda *how: drained.append(how))
    with metadata_service([(404,), (500,), notice()]) as (endpoint, asked):
        interruption.watch(interruption.Metadata(endpoint), every=0.01)
    assert len(asked) == 3
    ((seconds, action, node),) = drained
    assert 110 < seconds <= 120 and action == "terminate" and node is None


def test_a_token_that_has_expired_is_asked_for_again():
    with metadata_service([notice()]) as (endpoint, _):
        metadata = interruption.Metadata(endpoint)
        metadata.token, metadata.until = "old", time.monotonic() + 100
        assert metadata.notice() is None
        assert metadata.notice()[0] == "terminate"


def test_small_files_travel_and_others_are_told_of(tmp_path, monkeypatch):
    config = tmp_path / "a.toml"
    config.write_text("seed = 3")
    labels = tmp_path / "b.csv"
    labels.write_text("uri\n")
    words = ["select", "--config", str(config), f"--labeled={labels}", "--run", "s3://b/r", "--set", "seed=3"]
    packed = submission.pack(words)
    assert packed.words[:4] == ["select", "--config", "0-a.toml", "--labeled=1-b.csv"]
    assert packed.words[4:] == words[4:] and list(packed.files.values()) == [config, labels]
    here = submission.pack(["select", "--images", "photos", "--run=runs/one", "--encoder", "pca"]).words
    assert here == ["select", "--images", str(Path("photos").absolute()), *here[3:]], "a job runs elsewhere"
    assert here[3:] == [f"--run={Path('runs/one').absolute()}", "--encoder", "pca"]
    before = packed.name
    config.write_text("seed = 4")
    assert submission.pack(words).name != before
    monkeypatch.setattr(submission, "LARGEST_BYTES", 3)
    with pytest.raises(UserError, match="too large to travel"):
        submission.pack(words)


def test_wrong_usage_is_told_before_anything_is_sent():
    assert "is not run on a cluster" in line_of(ask("submit", "status", "--run", "x"), 2)
    assert "--bugdet" in line_of(ask("submit", "select", "--bugdet", "3", "--run", "s3://b/r"), 2)
    nowhere = ("submit", "--job-address", "http://127.0.0.1:9")
    assert "no cluster answers" in line_of(ask(*nowhere, "select", "--run", "s3://b/r"), 1)


class Gone:
    """The Jobs API of a cluster that goes away while it is followed, and may come back."""

    def __init__(self, answers):
        self.answers = iter(answers)

    async def tail_job_logs(self, job):
        if next(self.answers) == "gone":
            raise ConnectionError("connection refused")
        yield "a line\n"

    def get_job_info(self, job):
        state = next(self.answers)
        if state == "gone":
            raise RuntimeError("Failed to connect")
        return JobDetails(
            type=JobType.SUBMISSION, status=JobStatus(state), entrypoint="x", driver_exit_code=0
        )


def test_a_cluster_that_is_gone_is_not_followed_for_ever(monkeypatch, capsys):
    monkeypatch.setattr(submission, "RECONNECT_SECONDS", 0.01)
    monkeypatch.setattr(submission, "GONE_SECONDS", 0.2)
    comes_back = ["here", "RUNNING", "gone", "gone", "gone", "here", "SUCCEEDED"]
    assert submission._follow(Gone(comes_back), "j", "http://head") == 0
    assert capsys.readouterr().out.count("a line") == 1
    began = time.monotonic()
    with pytest.raises(UserError, match="http://head has not answered for") as told:
        submission._follow(Gone(["here", "RUNNING", *["gone"] * 1000]), "job-7", "http://head")
    assert time.monotonic() - began < 10
    assert "submit the same command to follow it again" in str(told.value) and "job-7" in str(told.value)


QUIET = {"density.k": 5, "cluster.iterations": 60, "cluster.tolerance": 0.0}


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def answers(port):
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two machines, as far as Ray can tell, that want a token; what a client must have in its environment."""
    folder = tmp_path_factory.mktemp("token")
    token = folder / "auth_token"
    token.write_text("0123456789abcdef" * 4)
    port, api = free_port(), free_port()
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    environment.pop("RAY_ADDRESS", None)
    here = ["--node-ip-address=127.0.0.1", "--block", "--disable-usage-stats"]
    head = ["--head", f"--port={port}", "--num-cpus=0", f"--dashboard-port={api}", "--include-dashboard=true"]
    starts = [[*head, *here], [f"--address=127.0.0.1:{port}", "--num-cpus=2", *here]]
    processes = []
    try:
        for words in starts:
            # Both are on one machine, where the default port would be taken.
            agent = f"--dashboard-agent-listen-port={free_port()}"
            said = folder / f"{len(processes)}.log"
            with said.open("w") as log:
                process = subprocess.Popen(
                    [str(BIN / "ray"), "start", *words, agent],
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            processes.append(process)
            deadline = time.monotonic() + 90
            while "Ray runtime started" not in said.read_text():
                assert process.poll() is None and time.monotonic() < deadline, said.read_text()
                time.sleep(0.2)
        # The Jobs API comes a little after.
        while not answers(api):
            assert time.monotonic() < deadline + 60
            time.sleep(0.2)
        api_address = f"http://127.0.0.1:{api}"
        yield {**environment, "RAY_API_SERVER_ADDRESS": api_address, "ADDRESS": f"127.0.0.1:{port}"}
    finally:
        for process in reversed(processes):
            os.killpg(process.pid, signal.SIGTERM)
        for process in processes:
            try:
                process.wait(8)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def submitted(environment, *words, status=0):
    answer = subprocess.run(
        [sys.executable, "-m", "selective_ray", "submit", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert answer.returncode == status, answer.stdout + answer.stderr
    return answer.stdout + answer.stderr


def test_a_command_is_submitted_followed_and_resumed(cluster, tmp_path):
    x = unit(np.random.default_rng(0).normal(size=(600, 16)))
    np.save(tmp_path / "x.npy", x)
    config = tmp_path / "config.toml"
    config.write_text("[selection]\nbudget = 20\n")
    words = ["select", "--embeddings", str(tmp_path / "x.npy"), "--config", str(config)]
    words += ["--run", str(tmp_path / "run"), "--set", "density.k=5"]
    said = submitted(cluster, *words)
    assert "submitted as job selective-ray-select-" in said and "to stop it" in said
    assert "20 selected" in said
    assert Run(str(tmp_path / "run")).manifest("selection").rows == 20
    assert "nothing to do" in submitted(cluster, *words)
    # Its own exit status and sentence come back.
    said = submitted(cluster, *words, "--set", "density.floor=0.5", status=1)
    assert "density.floor" in said and "another --run" in said


def test_two_jobs_at_once_do_not_disturb_each_other(cluster, tmp_path):
    """Each has its own picks, those that it has alone."""
    rng = np.random.default_rng(1)
    runs = []
    for name in ("a", "b"):
        x = unit(rng.normal(size=(3000, 16)))
        np.save(tmp_path / f"{name}.npy", x)
        words = ["select", "--embeddings", str(tmp_path / f"{name}.npy"), "--budget", "25"]
        words += ["--run", str(tmp_path / name), "--set", "density.k=5", "--set", "resources.workers=1"]
        words += ["--set", "cluster.iterations=60", "--set", "cluster.tolerance=0"]
        runs.append((name, words, in_memory.select(x, 25, settings=QUIET).rows.tolist()))
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "selective_ray", "submit", *words],
            env=cluster,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _, words, _ in runs
    ]
    for process, (name, _, expected) in zip(both, runs, strict=True):
        out, _ = process.communicate(timeout=240)
        assert process.returncode == 0, out
        picks = Run(str(tmp_path / name)).read_shard("selection", 0)["image_id"].to_pylist()
        assert picks == expected


def test_of_two_writers_of_a_run_the_second_is_refused(cluster, tmp_path):
    np.save(tmp_path / "x.npy", unit(np.random.default_rng(1).normal(size=(300, 16))))
    run = Run(str(tmp_path / "run"))
    run.prepare()
    with Lease(run):
        words = ["select", "--embeddings", str(tmp_path / "x.npy"), "--budget", "25", "--run", run.uri]
        said = submitted(cluster, *words, status=1)
    assert f"in use by process {os.getpid()}" in said and "Traceback" not in said
    assert not (tmp_path / "run" / "embeddings").exists()


def test_without_the_token_no_one_gets_in(cluster, tmp_path):
    stranger = {**cluster, "HOME": str(tmp_path)}
    del stranger["RAY_AUTH_TOKEN_PATH"]
    said = submitted(stranger, "select", "--embeddings", "s3://b/x.npy", "--run", "s3://b/r", status=1)
    assert "Traceback" not in said


def test_a_cluster_is_looked_at(cluster, tmp_path):
    words = ["check", "--address", cluster["ADDRESS"], "--run", str(tmp_path), "--json"]
    answer = subprocess.run(
        [sys.executable, "-m", "selective_ray", *words],
        env=cluster,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    found = {line["what"]: line for line in json.loads(answer.stdout)["checked"]}
    for what in (
        "versions",
        "machines",
        "clocks",
        "token",
        "results",
        f"read, write, conditional put at {tmp_path}",
    ):
        assert found[what]["fit"] is True, found[what]
    assert "on all 2 machines" in found["versions"]["seen"]
    # The head runs no work.
    assert "on 1 machines" in found["results"]["seen"]
    assert found["GPU results"]["fit"] is None
    wrong = [line for line in found.values() if line["fit"] is False]
    assert answer.returncode == (1 if wrong else 0)
    assert {line["what"] for line in wrong} <= {"open files", "/dev/shm"}, wrong
    assert not list(tmp_path.glob(".check*"))


def test_what_is_not_fit_is_named_with_its_machine():
    names = {"a": "10.0.0.1", "b": "10.0.0.2", "c": "10.0.0.3"}
    here = {"python": check.platform.python_version(), **{n: check._version(n) for n in check.PACKAGES}}
    good = {"versions": here, "open_files": 2**20, "shm": 2**40, "time": time.time(), "token": True}
    looks = {
        "a": good,
        "b": good | {"versions": here | {"ray": "2.1"}, "open_files": 1024, "time": good["time"] - 60},
        "c": good | {"shm": 1, "token": False},
    }
    line = check._versions(looks, names)
    assert not line.fit and line.seen == f"10.0.0.2: ray 2.1 ({here['ray']} here)"
    line = check._limits("open files", looks, names, "open_files", 65_535, "raise it")
    assert not line.fit and line.seen.startswith("10.0.0.2: 1,024; 65,535 are needed")
    nodes = [{"NodeID": node, "Resources": {"object_store_memory": 1e9}} for node in looks]
    line = check._shared_memory(looks, nodes, names)
    assert not line.fit and line.seen.startswith("10.0.0.3: 0.0 GB for an object store of 1.0 GB")
    line = check._clocks(looks, names)
    assert not line.fit and line.seen == "10.0.0.2: -60.0 s"
    line = check._token(looks, names)
    assert not line.fit and line.seen == "10.0.0.3: RAY_AUTH_MODE is not token"
    line = check._results({"a": "123", "b": "124"}, names)
    assert not line.fit and "10.0.0.2: 124" in line.seen
    assert check._results({"a": "123", "b": "123"}, names).fit
    assert not check._results({"a": "failed: x"}, names).fit
    silent = looks | {"c": None}
    line = check._silent(silent, names)
    assert not line.fit and line.seen.startswith("10.0.0.3: no answer")


def test_a_bucket_without_conditional_puts_is_told(tmp_path, monkeypatch):
    look = check._bucket._function
    assert look(str(tmp_path), check.Access()) == "ok"
    monkeypatch.setattr(check.objects, "is_local", lambda uri: False)
    for content, said in ((b"first", "ok"), (b"second", "a conditional put overwrites")):
        monkeypatch.setattr(check.objects, "write", lambda *_, **__: None)
        monkeypatch.setattr(check.objects, "delete", lambda *_: None)
        monkeypatch.setattr(check.objects, "read", lambda *_, content=content: content)
        assert look("s3://b/r", check.Access()).startswith(said)
