"""Two hosts train over a link; one is cut off in mid-run, and the other one finishes the run.

The hosts are network namespaces joined by a veth pair: what is between them is a real link, with
nobody left to close the connections when it goes down.
"""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from tests.unicl.corpus import small_recipe, write_corpus
from tests.unicl.history import attempts, seen, surviving, train
from unicl.engine.checkpoint import checkpoints

STEPS = 40
TIMEOUT = 10


def ip(*words, check=True):
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if check and done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@contextmanager
def linked_hosts():
    """Yield two namespaces and their addresses; skip where this machine cannot make them."""
    if shutil.which("ip") is None:
        pytest.skip("needs ip, from iproute2")
    names = [f"unicl-{os.getpid()}-{side}" for side in "ab"]
    addresses = ["10.203.0.1", "10.203.0.2"]
    links = [f"u{os.getpid() % 100000}{side}" for side in "ab"]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            pair = ["peer", "name", links[1], "netns", names[1]]
            ip("link", "add", links[0], "netns", names[0], "type", "veth", *pair)
            for name, link, address in zip(names, links, addresses, strict=True):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
                ip("-n", name, "link", "set", link, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except OSError as error:
            pytest.skip(f"needs root and network namespaces: {error}")
        yield list(zip(names, links, addresses, strict=True))
    finally:
        for name in names:
            ip("netns", "del", name, check=False)


def start_node(host, endpoint, arguments, log):
    name, link, address = host
    command = [
        *("ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "5"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "two-hosts"),
        # A namespace has no name by which a node could find out that the endpoint is itself.
        *("--rdzv-conf", f"is_host={endpoint.startswith(address)},last_call_timeout=5"),
        *("--local-addr", address, "-m", *arguments),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": link}
    with log.open("w") as file:
        return subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, start_new_session=True
        )


def wait_for(condition, seconds, logs):
    for _ in range(int(seconds * 5)):
        if condition():
            return
        time.sleep(0.2)
    pytest.fail("\n".join(log.read_text()[-3000:] for log in logs))


def ranks_of(run, number):
    """How many ranks the attempt had that is last, last but one, ..."""
    attempt = sorted({log.name.split("-")[1] for log in run.glob("seen-*")})[number]
    return len(list(run.glob(f"seen-{attempt}-*")))


def both_are_at_work(run):
    """Whether the present attempt has two ranks, and has done what will survive."""
    if not checkpoints(run / "checkpoints"):
        return False
    steps = attempts(run)[-1]
    return ranks_of(run, -1) == 2 and max(steps) - min(steps) >= 7


@pytest.mark.slow
def test_a_host_that_is_cut_off_costs_no_sample(tmp_path):
    keys = {
        **small_recipe(write_corpus(tmp_path / "train")),
        "trainer.steps": str(STEPS),
        "trainer.save_every": "3",
        "engine.timeout_seconds": str(TIMEOUT),
    }
    (tmp_path / "keys.json").write_text(json.dumps(keys))
    run = tmp_path / "run"
    arguments = ["tests.unicl.history", str(run), str(tmp_path / "keys.json")]
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    nodes = []
    with linked_hosts() as hosts:
        endpoint = f"{hosts[0][2]}:29477"
        try:
            for host, log in zip(hosts, logs, strict=True):
                nodes.append(start_node(host, endpoint, arguments, log))
            wait_for(lambda: both_are_at_work(run), 120, logs)
            cut = time.monotonic()
            ip("-n", hosts[1][0], "link", "set", hosts[1][1], "down")
            assert nodes[0].wait(timeout=240) == 0, logs[0].read_text()[-3000:]
        finally:
            for node in nodes:
                if node.poll() is None:
                    os.killpg(node.pid, signal.SIGKILL)
                node.wait()
    lives = attempts(run)
    assert lives[-2].keys() - lives[-1].keys()  # what the host that was cut off helped to do
    assert [ranks_of(run, number) for number in (-2, -1)] == [2, 1]
    assert not train(tmp_path / "alone", keys)
    plan = seen(tmp_path / "alone", 0)
    history = surviving(lives)
    assert history == plan
    assert sorted(history) == list(range(STEPS))
    assert len(list(itertools.chain(*history.values()))) == STEPS * 12
    assert time.monotonic() - cut < 300
