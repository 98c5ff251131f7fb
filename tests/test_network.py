"""Hosts that lose their network; each is a namespace of Linux on one bridge.

`pytest -m slow tests/test_network.py`, as root, with the packages iproute2 and
util-linux. No address leaves the namespaces.
"""

import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

import test_processes as runs

pytestmark = pytest.mark.integration

HOSTS = 4
ADDRESS = "10.213.0.{}"
TOOLS = ("ip", "tc", "nsenter", "unshare")
# Its name is its address, which gloo looks up to find where to listen. It lasts
# until its input closes, and with it all that it holds: so nothing is left,
# however a test ends.
HOST = """\
echo "$0" > /proc/sys/kernel/hostname
ip link set lo up
echo ready
exec cat
"""
CONNECT = """\
ip link add "port$0" type veth peer name eth0 netns "$1"
ip link set "port$0" master bridge up
"""
PROBE = """\
ip link add bridge type bridge
ip link add port type veth peer name other
ip link set port master bridge up
tc qdisc add dev port root blackhole
"""
# In the host and in the switch: what is sent is lost, and nobody is told.
LOSS = "tc qdisc add dev {} root blackhole"

undisturbed = runs.undisturbed


def missing():
  """Why there can be no such network here; "" if there can."""
  if sys.platform != "linux":
    return "needs the namespaces of Linux"
  tools = [tool for tool in TOOLS if shutil.which(tool) is None]
  if tools:
    return f"needs the programs {', '.join(tools)}"
  probe = subprocess.run(
    ["unshare", "--net", "--uts", "sh", "-ec", PROBE],
    stderr=subprocess.PIPE,
    text=True,
    check=False,
  )
  if probe.returncode:
    return f"needs namespaces, veth, bridge and tc: {probe.stderr.strip()}"
  return ""


def inside(host, *command):
  """A command that runs on a host, which is the process that holds it."""
  return ["nsenter", f"--target={host}", "--net", "--uts", *command]


def shell(host, script, *arguments):
  command = inside(host, "sh", "-ec", script, *map(str, arguments))
  subprocess.run(command, check=True)


@pytest.fixture
def network(popen):
  """A switch, and the hosts at it."""
  if reason := missing():
    pytest.skip(reason)

  def hold(name):
    holder = popen(
      ["unshare", "--net", "--uts", "sh", "-ec", HOST, name],
      stdin=subprocess.PIPE,
    )
    assert holder.stdout.readline() == "ready\n"
    return holder.pid

  switch, hosts = hold("switch"), []
  shell(switch, "ip link add bridge type bridge && ip link set bridge up")
  for i in range(HOSTS):
    host = hold(ADDRESS.format(i + 1))
    shell(switch, CONNECT, i, host)
    shell(host, 'ip addr add "$(uname -n)/24" dev eth0; ip link set eth0 up')
    hosts.append(host)
  return switch, hosts


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("cut", ["link down", "all lost"])
def test_a_host_without_network_ends_the_run_which_goes_on_with_fewer(
  tmp_path, popen, network, undisturbed, cut, rank
):
  switch, hosts = network
  first, *rest = runs.command(tmp_path)
  running = []
  for i, host in enumerate(hosts):
    where = f"--distributed={ADDRESS.format(1)}:4213,{i},{HOSTS}"
    running.append(
      popen(
        inside(host, *runs.PROGRAM, first, where, *rest),
        cwd=runs.ROOT,
        env=runs.environment(FEDJAX_SIM_CPU_DEVICES="1"),
        stdout=subprocess.DEVNULL,
      )
    )
  runs.wait_for_rounds(tmp_path)
  if cut == "link down":
    shell(hosts[rank], "ip link set eth0 down")
  else:
    shell(hosts[rank], LOSS.format("eth0"))
    shell(switch, LOSS.format(f"port{rank}"))

  began, ended = time.monotonic(), []
  for i, process in enumerate(running):
    _, told = process.communicate(timeout=100)
    ended.append(time.monotonic() - began)
    assert process.returncode == 75, told
    assert told.count(f"fedjax-sim: rank {i} stopped after round") == 1, told
  print(f"{cut}, rank {rank}: all ended {max(ended):.1f} s later")
  limit = float(runs.FIELDS["runtime.peer_timeout"]) + runs.ALLOWANCE
  assert max(ended) < limit
  assert len(runs.rounds_of(tmp_path)) < 30
  assert any((tmp_path / "checkpoints").glob("[0-9]*"))

  code, told = runs.finish(runs.launch(2, tmp_path))
  assert code == 0, told
  assert runs.rounds_of(tmp_path) == list(range(1, 31))
  np.testing.assert_allclose(runs.params(tmp_path), undisturbed, atol=1e-6)
