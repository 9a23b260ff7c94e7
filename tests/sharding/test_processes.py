"""Two real processes on CPUs: the tokens of one device, and the end of both when one is killed."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path
import re
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from hf_files import hf_tensors, write_model
from jax import numpy as jnp
import numpy as np
import pytest

from sharding.launch import connection, leader_worker_set, parser
from sharding.messages import Receiver, Sender
from sharding.processes import Processes
from slora_jax.loading import load_model, save_orbax

sys.path.insert(0, str(Path(__file__).parent))
import several_processes  # noqa: E402

ROOT = Path(__file__).parents[2]
START_SECONDS = 400  # a slow machine compiles for long
END_SECONDS = 30


@contextlib.contextmanager
def two_processes(*args):
    """The two processes, whose output goes to files beside the first argument. They are killed at the end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    env = os.environ | dict(
        JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="1", PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1", XLA_FLAGS=""
    )
    started = []
    try:
        for i in range(2):
            command = [sys.executable, "-m", "sharding.launch", "--coordinator", f"127.0.0.1:{port}"]
            command += ["--processes", "2", "--process", str(i), several_processes.__file__, *map(str, args)]
            with open(f"{args[0]}.{i}.log", "wb") as log:
                started.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def logs(out) -> list[str]:
    return [Path(f"{out}.{i}.log").read_text() for i in range(2)]


@pytest.fixture(scope="module")
def wanted():
    """Answers of one device. All three sources hold the same weights."""
    with several_processes.make_engine(several_processes.SHAPE, 1) as engine:
        return several_processes.answers(engine)


def test_the_tokens_are_those_of_one_device(tmp_path, wanted):
    """From an Orbax directory, of which each process restores its part."""
    out = tmp_path / "tokens.json"
    model = load_model(several_processes.SHAPE, dtype="float32")
    path = save_orbax(tmp_path / "model", model.config, model.params)
    with two_processes(out, path, "once") as processes:
        codes = [process.wait(START_SECONDS) for process in processes]
        assert codes == [0, 0], logs(out)
    assert json.loads(out.read_text()) == wanted


@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_is_killed_the_other_ends_and_says_why(tmp_path, killed, wanted):
    """Process 1 while the model came from safetensors."""
    out = tmp_path / "tokens.json"
    source = several_processes.SHAPE
    if killed:
        model, source = load_model(source, dtype="float32"), tmp_path / "model"
        write_model(source, "tiny-gqa", tensors=hf_tensors(model.config, model.params))
    with two_processes(out, source, "wait") as processes:
        deadline = time.monotonic() + START_SECONDS
        while not out.exists():
            assert time.monotonic() < deadline and all(p.poll() is None for p in processes), logs(out)
            time.sleep(0.1)
        processes[killed].send_signal(signal.SIGKILL)
        code = processes[1 - killed].wait(END_SECONDS)
    assert code not in (0, None)
    assert f"process {killed} has ended" in logs(out)[1 - killed]
    assert json.loads(out.read_text()) == wanted


@contextlib.contextmanager
def pair(on_loss=lambda message: None):
    """Two ends of a connection, and the second one's socket."""
    here, there = socket.socketpair()
    with here, there:
        ends = Processes(0, {1: here}, on_loss), Processes(1, {0: there}, on_loss)
        yield *ends, there
        for end in ends:
            end.close()


def test_messages_arrive_in_order_with_their_arrays():
    sent = [("a", {"x": np.arange(5)}), ("b", [np.ones((2, 3), np.float32), 7]), ("a", {"x": np.arange(6)})]
    with pair() as (leader, follower, _):
        for message in sent:
            leader.send(message)
        for kind, content in sent:
            got = follower.receive()
            assert got[0] == kind
            np.testing.assert_equal(got[1], content)
        leader.close()
        assert follower.receive() is None


def test_a_closed_connection_is_a_loss_and_a_goodbye_is_none():
    lost = []
    with pair(lost.append) as (leader, follower, there):
        there.shutdown(socket.SHUT_RDWR)
        deadline = time.monotonic() + 20
        while len(lost) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert {message.partition(" (")[0] for message in lost} == {"process 0 has ended", "process 1 has ended"}
    lost.clear()
    with pair(lost.append) as (leader, follower, there):
        leader.close()
        assert follower.receive() is None
        follower.close()
        there.shutdown(socket.SHUT_RDWR)
        time.sleep(0.1)
        assert not lost


def test_what_did_not_change_is_not_sent_again():
    sender, receiver = Sender(), Receiver()
    table, tokens = np.arange(10000), np.zeros(4)
    sizes = []
    for i in range(4):
        tokens[0] = i
        if i == 3:
            table[5] = 0  # in place, as a table that is kept from step to step
        frames = sender.encode((table, tokens) if i != 2 else (tokens,))
        sizes.append(sum(map(len, frames)))
        got = receiver.decode(frames)
        np.testing.assert_equal(got, (table, tokens) if i != 2 else (tokens,))
    assert sizes[0] > 80000 and sizes[1] < 1000 and sizes[3] > 80000


@dataclasses.dataclass(frozen=True)
class Parcel:
    array: Any
    inner: Any = None
    kind: str = "plain"


def test_a_message_is_data_of_expected_kinds():
    array = jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)
    message = (Parcel(np.asarray(array), Parcel(np.zeros((0, 4), bool))), {"o", "qkv"}, np.int32(3), None, [1.5, "[]"])
    got = Receiver().decode(Sender().encode(message), [Parcel])
    assert got[0].array.dtype == array.dtype and got[0].array.tolist() == array.tolist()
    assert got[0].inner.array.shape == (0, 4) and got[0].inner.array.dtype == bool and got[0].kind == "plain"
    assert got[1:] == ({"o", "qkv"}, 3, None, [1.5, "[]"])
    with pytest.raises(ValueError, match="holds a Parcel"):
        Receiver().decode(Sender().encode(message))
    with pytest.raises(TypeError, match="cannot hold a function"):
        Sender().encode(test_who_is_who)


def test_who_is_who():
    lws = dict(LWS_LEADER_ADDRESS="pod-0.svc", LWS_GROUP_SIZE="4", LWS_WORKER_INDEX="2")
    assert leader_worker_set(lws) == dict(coordinator_address="pod-0.svc:8476", num_processes=4, process_id=2)
    assert leader_worker_set({"LWS_GROUP_SIZE": "4"}) is None
    args = parser().parse_args(["--local-devices", "0,1", "-m", "slora_jax", "serve", "--tp", "8"])
    assert (args.module, args.args) == ("slora_jax", ["serve", "--tp", "8"])
    assert connection(args, lws)["process_id"] == 2
    assert connection(args, {}) == dict(local_device_ids=[0, 1], initialization_timeout=300)
    args = parser().parse_args(["--coordinator", "h:1", "--processes", "2", "--process", "1", "script.py", "-x"])
    assert connection(args, lws)["coordinator_address"] == "h:1"
    assert args.args == ["script.py", "-x"]
    with pytest.raises(ValueError, match="all of --coordinator"):
        connection(parser().parse_args(["--processes", "2", "x.py"]), {})


@pytest.mark.parametrize(
    ("name", "env"),
    [
        (
            "SlurmCluster",
            dict(
                SLURM_JOB_ID="7", SLURM_STEP_NODELIST="node[3-4]", SLURM_NTASKS="2", SLURM_PROCID="1", SLURM_LOCALID="0"
            ),
        ),
        (
            "OmpiCluster",
            dict(
                OMPI_MCA_orte_hnp_uri="1.0;tcp://10.0.0.1:3",
                OMPI_COMM_WORLD_SIZE="2",
                OMPI_COMM_WORLD_RANK="1",
                OMPI_COMM_WORLD_LOCAL_RANK="0",
            ),
        ),
    ],
)
def test_jax_finds_slurm_and_open_mpi(monkeypatch, name, env):
    """What the launcher leaves to JAX: the detection it relies on is there."""
    from jax._src.clusters import ClusterEnv

    for key, value in env.items():
        monkeypatch.setenv(key, value)
    found = next(c for c in ClusterEnv._cluster_types if c.__name__ == name)
    assert found.is_env_present() and found.get_process_count() == 2 and found.get_process_id() == 1


def test_the_examples_commands_parse():
    """The arguments after the launcher's in examples/several_hosts are ones that it and slora-jax take."""
    from slora_jax.cli.parser import parse_arguments

    where = ROOT / "examples" / "several_hosts"
    script = (
        (where / "slurm.sh").read_text().partition("sharding.launch")[2].replace("\\\n", " ").replace('"$1"', "MODEL")
    )
    pod = (where / "leader_worker_set.yaml").read_text()
    lines = [json.loads(part.split("\n")[0]) for part in re.findall(r"(?:command|args): (\[.*\])", pod)]
    for words in (script.split(), [*lines[0][3:], *lines[1]]):
        launched = parser().parse_args(words)
        assert launched.module == "slora_jax"
        assert parse_arguments(launched.args).tp == 16
