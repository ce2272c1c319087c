"""The launcher's agent on a host: inspects the host, starts its Ray node, waits for nodes, ends the node.

`remote.py` sends this file over ssh's standard input, so a host needs Python and Ray but not this package: it imports only the standard
library. The request follows on standard input, so that no secret is in an argument. The answer is the last line of the output.
"""

import fcntl
import importlib
import json
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
import uuid

ANSWER = "megatron-aspo-launch-answer "
"""Prefix of the line with the answer; login scripts may print other lines."""
MARK = "MEGATRON_ASPO_LAUNCH"
"""Environment variable inherited by every process of a node: the node's id, by which `stop` finds them."""
STARTED = "Ray runtime started."
REFUSED = "Authentication token is missing or incorrect"
TOO_SLOW = "The current node timed out during startup"
"""Ray's words when its raylet takes more than 30 s, which Ray fixes, to register: a busy machine takes longer now and then."""
_GRACE_S = 8.0
_LINES = 20
_UNIX_SOCKET = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
_UNIX_SOCKET_BYTES = 107


class Refused(Exception):
    """The host cannot fulfil the request; the text is one line with the cure."""


class TooSlow(Refused):
    """Ray's node did not register in time."""


def probe(request: dict) -> dict:
    """Return the host's state: versions, address, busy ports, and the node started by an earlier call, if it runs."""
    node = _live_node(request)
    busy = [] if node else [name for name, port in request["ports"].items() if _is_busy(port)]
    if request["extras"]:
        _check_extras(request["extras"])
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        floor = int(file.read().split()[0])
    return {
        "address": _own_address(request),
        "ray": _ray_version(),
        "python": sys.executable,
        "cpus": len(os.sched_getaffinity(0)),
        "gpus": len(os.listdir("/proc/driver/nvidia/gpus")) if os.path.isdir("/proc/driver/nvidia/gpus") else 0,
        "floor": floor,
        "busy": busy,
        "node": node and {key: node[key] for key in ("cluster", "name", "gcs", "role", "port")},
        "same_token": not node or _read(_token_path(request)) == request["token"],
    }


def start(request: dict) -> dict:
    """Start this host's node; return once Ray reports that it runs. Raises Refused with Ray's last lines if it does not.

    A node that did not register in Ray's time is started once more.
    """
    try:
        return _start_once(request)
    except TooSlow:
        return _start_once(request)


def _start_once(request: dict) -> dict:
    if _live_node(request):
        raise Refused("a node of an earlier call runs here meanwhile; call again")
    directory = _node_directory(request)
    os.makedirs(directory, mode=0o700, exist_ok=True)
    if request["token"]:
        _write_private(_token_path(request), request["token"])
    temporary = request["temp_dir"]
    if len(os.path.join(temporary, _UNIX_SOCKET)) > _UNIX_SOCKET_BYTES:
        raise Refused(
            f"--temp-dir {temporary} is too long: the paths of Ray's sockets in it exceed {_UNIX_SOCKET_BYTES} bytes; use a shorter one"
        )
    os.makedirs(temporary, mode=0o700, exist_ok=True)
    if os.stat(temporary).st_uid != os.getuid():
        raise Refused(f"{temporary} belongs to another user; name a directory of your own by --temp-dir")
    mark = uuid.uuid4().hex
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_AUTH_TOKEN", "RAY_ADDRESS")}
    # Process titles would overwrite the environment, in which `stop` looks for the mark.
    environment.update(request["environment"], SPT_NOENV="1", **{MARK: mark}, **_authentication(request))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65535)) if hard != resource.RLIM_INFINITY else 65535, hard))
    output = os.path.join(directory, "output.log")
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *request["arguments"], "--node-name", mark]
    with open(output, "w") as log:
        leader = subprocess.Popen(
            command, env=environment, cwd=directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    node = {key: request[key] for key in ("cluster", "gcs", "role", "port")}
    node.update(name=mark, boot=_boot_id(), leader=_identity(leader.pid), processes=[])
    _write_node(request, node)
    deadline = time.monotonic() + request["timeout_s"]
    try:
        while STARTED not in (text := _read(output)):
            if REFUSED in text:  # Ray would retry until the timeout
                raise Refused(f"the head refuses this host's token: give every node the same, by --token-file:\n{_tail(output)}")
            if leader.poll() is not None:
                reason = TooSlow if TOO_SLOW in _read(output) else Refused
                raise reason(f"ray start ended with status {leader.returncode}:\n{_tail(output)}")
            if time.monotonic() > deadline:
                raise Refused(f"ray start did not finish within {request['timeout_s']:g} s:\n{_tail(output)}")
            time.sleep(0.1)
    except BaseException:
        stop(request)
        raise
    node["processes"] = [_identity(pid) for pid in _descendants([leader.pid])]
    _write_node(request, node)
    return {"name": mark, "output": output}


def wait_for_nodes(request: dict) -> dict:
    """Wait until the nodes with these names are alive in the cluster; return those that are not at the timeout."""
    os.environ.update(_authentication(request))
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]  its stub lacks it

    expected, deadline, missing, problem = set(request["names"]), time.monotonic() + request["timeout_s"], set(), ""
    while True:
        try:
            nodes = GcsClient(address=request["gcs"]).get_all_node_info(timeout=5).values()
            alive = [node for node in nodes if node.state == 0]
            missing, problem = expected - {node.node_name for node in alive}, ""
            if not missing and len(alive) >= request["count"]:
                return {"missing": [], "alive": len(alive)}
        except Exception as error:
            missing, alive, problem = expected, [], " ".join(str(error).split())[:300]
        if time.monotonic() > deadline:
            return {"missing": sorted(missing), "alive": len(alive), "problem": problem}
        time.sleep(0.3)


def status(request: dict) -> dict:
    """Return whether this host's node runs, and its last lines of output."""
    return {"alive": _live_node(request) is not None, "tail": _tail(os.path.join(_node_directory(request), "output.log"))}


def stop(request: dict) -> dict:
    """End exactly what `start` started here; return the number of ended processes. Idempotent."""
    node = _read_record(request)
    if node is None:
        return {"ended": 0}
    first = _processes_of(node)
    # The leader ends its children in order; the remaining processes get SIGTERM, and SIGKILL after the grace period.
    leader = [pid for pid in first if _identity(pid) == node["leader"]]
    _signal(leader, signal.SIGTERM)
    _wait_for_end(leader, _GRACE_S)
    _signal(remaining := _processes_of(node), signal.SIGTERM)
    _wait_for_end(remaining, _GRACE_S / 4)
    deadline = time.monotonic() + _GRACE_S
    while left := _processes_of(node):
        _signal(left, signal.SIGKILL)
        _wait_for_end(left, 0.5)
        if time.monotonic() > deadline:
            raise Refused(f"processes {', '.join(map(str, left))} do not end even by SIGKILL")
    os.unlink(_node_path(request))
    return {"ended": len(first)}


def follow(request: dict) -> dict:
    """Return when this host's node has ended."""
    node = _read_record(request)
    while node and _leader_is_alive(node):
        time.sleep(0.5)
    return {"tail": _tail(os.path.join(_node_directory(request), "output.log"))}


def _check_extras(options: list[str]) -> None:
    """Raise Refused if Ray lacks the packages for these launcher options: its dashboard and metrics are an extra."""
    try:
        importlib.import_module("ray.dashboard.optional_deps")
    except ImportError as error:
        install = f"{sys.executable} -m pip install 'ray[default]=={_ray_version()}'"
        raise Refused(f"{' and '.join(options)} need packages of Ray that are not installed here ({error}): {install}") from error


def _authentication(request: dict) -> dict:
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": _token_path(request)} if request["token"] else {"RAY_AUTH_MODE": "disabled"}


def _node_directory(request: dict) -> str:
    # One directory per host, because hosts often share a home directory.
    return os.path.join(os.path.expanduser(request["directory"]), "nodes", re.sub(r"[^A-Za-z0-9._-]", "_", request["host"]))


def _node_path(request: dict) -> str:
    return os.path.join(_node_directory(request), "node.json")


def _token_path(request: dict) -> str:
    return os.path.join(_node_directory(request), "token")


def _read_record(request: dict) -> "dict | None":
    text = _read(_node_path(request))
    node = json.loads(text) if text else None
    return node if node and node["boot"] == _boot_id() else None


def _live_node(request: dict) -> "dict | None":
    node = _read_record(request)
    return node if node and _leader_is_alive(node) else None


def _leader_is_alive(node: dict) -> bool:
    return _identity(node["leader"][0]) == node["leader"]


def _write_node(request: dict, node: dict) -> None:
    _write_private(_node_path(request), json.dumps(node))


def _write_private(path: str, text: str) -> None:
    """Write the file whole or not at all, readable only by this user from the first byte on."""
    unfinished = f"{path}.{os.getpid()}"
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w") as file:
        file.write(text)
    os.rename(unfinished, path)


def _read(path: str) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return ""


def _tail(path: str) -> str:
    lines = [line.rstrip() for line in _read(path).splitlines() if line.strip()]
    return "\n".join(lines[-_LINES:])


def _boot_id() -> str:
    """Return an id that changes when this host restarts and differs between containers."""
    return _read("/proc/sys/kernel/random/boot_id").strip() + " " + os.readlink("/proc/self/ns/pid")


def _stat(pid: int) -> "list[str]":
    """Return a process's state, parent and so on, from the third field of /proc/PID/stat on; empty if there is no such process."""
    try:
        return _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    except OSError:  # it ended during the read
        return []


def _identity(pid: int) -> "list[int]":
    """Return process id and start time, which together are unique; the time is -1 for a process that has ended."""
    fields = _stat(pid)
    return [pid, int(fields[19]) if fields and fields[0] not in "ZX" else -1]


def _descendants(pids: "list[int]") -> "list[int]":
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (fields := _stat(int(name))):
            children.setdefault(int(fields[1]), []).append(int(name))
    found, waiting = [], list(pids)
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _processes_of(node: dict) -> "list[int]":
    """Return the node's live processes: recorded ones that are still the same, those with its mark, and all their descendants."""
    roots = {pid for pid, started in [node["leader"], *node["processes"]] if started >= 0 and _identity(pid) == [pid, started]}
    line = f"{MARK}={node['name']}".encode()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/environ", "rb") as file:
                    if line in file.read().split(b"\0"):
                        roots.add(int(name))
            except OSError:  # another user's process, or one that has ended
                continue
    # This agent is itself below the node if a job of the cluster calls `stop`.
    return [pid for pid in {*roots, *_descendants(list(roots))} if pid != os.getpid() and _identity(pid)[1] >= 0]


def _signal(pids: "list[int]", number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            continue


def _wait_for_end(pids: "list[int]", limit_s: float) -> None:
    known = {pid: _identity(pid) for pid in pids}
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and any(started[1] >= 0 and _identity(pid) == started for pid, started in known.items()):
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:  # reap, if the agent itself is the parent
                pass
        except ChildProcessError:
            pass
        time.sleep(0.05)


def _is_busy(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignore connections in TIME_WAIT
        try:
            tried.bind(("0.0.0.0", port))
            tried.listen(1)
        except OSError:
            return True
    return False


def _own_address(request: dict) -> str:
    """Return the IPv4 address at which the other hosts reach this one."""
    if request["interface"]:
        return _interface_address(request["interface"])
    name = request["host"].rpartition("@")[2]
    if re.fullmatch(r"[0-9]+(\.[0-9]+){3}", name) and not name.startswith("127."):
        return name
    # The address on which ssh arrived, else the name's address, else the source address of packets to the other hosts.
    arrived = os.environ.get("SSH_CONNECTION", "").split()
    if request["over_ssh"] and len(arrived) == 4 and ":" not in arrived[2]:
        return arrived[2]
    own = _resolved(name)
    if own and not own.startswith("127."):
        return own
    for peer in [*request["peers"], "192.0.2.1"]:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe_socket:
            try:
                probe_socket.connect((peer.rpartition("@")[2], 9))  # UDP: nothing is sent
            except OSError:
                continue
            if not (own := probe_socket.getsockname()[0]).startswith("127."):
                return own
    return "127.0.0.1"


def _resolved(name: str) -> str:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return ""


def _interface_address(interface: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket.fileno(), 0x8915, struct.pack("256s", interface.encode()[:15]))  # SIOCGIFADDR
        except OSError as error:
            there = ", ".join(sorted(name for _, name in socket.if_nameindex()))
            raise Refused(f"--interface {interface} has no IPv4 address here; interfaces of this host: {there}") from error
    return socket.inet_ntoa(answer[20:24])


def _ray_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ray")
    except PackageNotFoundError as error:
        raise Refused(
            f"{sys.executable} has no Ray; name the Python of your environment by --python, or the command that activates it by --env"
        ) from error


VERBS = {"probe": probe, "start": start, "wait_for_nodes": wait_for_nodes, "status": status, "stop": stop, "follow": follow}


def main() -> None:
    """Read the request, fulfil it, print the answer."""
    # A hang-up of the ssh connection must not leave a node half recorded.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    request = json.loads(sys.stdin.buffer.read())
    try:
        answer = VERBS[request["verb"]](request)
    except Refused as error:
        answer = {"refused": str(error)}
    except OSError as error:
        answer = {"refused": f"{request['verb']}: {error}"}
    print("\n" + ANSWER + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
