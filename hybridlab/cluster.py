"""Jobs of a sweep on a Ray cluster, so that none shares a GPU, or on a CPU a node, with another; their runs come back
as bytes, are held against their manifests, and join the run store whole."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from hybridlab import finished, jobs, store
from hybridlab.errors import RunError, SweepError
from hybridlab.files import atomic_write
from hybridlab.manifests import MANIFEST, load, verify
from hybridlab.sweeps import Job, Sweep

NAME = re.compile(r"\w[\w.-]*")
START_S = 60.0  # for a node to say what it is, and for a run to come back
REACH_S = 10.0  # for a connection to its port
TRIES = "RAY_gcs_server_port_wait_time_s"  # how often Ray tries to join, 40 s each, with warnings on standard error


@contextlib.contextmanager
def joined(address: str) -> Iterator[Any]:
    """Ray, connected to the cluster at `address` ("auto", host:port, ray://host:port) or to one of its own ("local").
    That one has no dashboard, serves only who holds its secret, and ends with the block.

    Raises: SweepError without Ray or a cluster.
    """
    if address == "local":  # Ray reads these when it is imported; its servers listen on every interface
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_USAGE_STATS_ENABLED="0")
    try:
        import ray
    except ImportError:
        raise SweepError("Ray is not installed", "--cluster needs it", "pip install 'hybridlab[cluster]'") from None
    settings: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "error"}
    if address == "local":
        settings |= {"include_dashboard": False, "_node_ip_address": "127.0.0.2" if sys.platform == "linux" else None}
    given = os.environ.get(TRIES)
    try:
        if address != "local":
            _reach(address)
            os.environ[TRIES] = given or "1"
        ray.init(**settings)
    except Exception as error:  # what it raises depends on the kind of address and on the version
        raise SweepError(f"there is no Ray cluster at {address!r}", " ".join(f"{error}".split())[:300],
                         "start one with `ray start --head`, or use --cluster local") from None
    finally:
        if given is None:
            os.environ.pop(TRIES, None)
    try:
        yield ray
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raise `OSError` or `OverflowError` where nobody listens at a host:port: Ray would ask for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()


def facts(ray: Any, device: str) -> dict[str, dict[str, str | None]]:
    """What a job would be measured on, by node, see `store.FACTS`. Raises: SweepError for a node that cannot say."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked = {node["NodeID"]: ray.remote(store.here).options(
        num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
    ).remote(device) for node in _nodes(ray, device)}
    try:
        return {f"node {name[:8]} ({device})": ray.get(answer, timeout=START_S) for name, answer in asked.items()}
    except ray.exceptions.RayError as error:
        raise SweepError("a node of the cluster cannot run hybridlab", _last(error),
                         "install the same version of hybridlab on every node") from None


@contextlib.contextmanager
def executor(address: str, sweep: Sweep, todo: list[Job], root: Path) -> Iterator[jobs.Executor]:
    """The cluster as what runs these jobs, in any order. Raises: SweepError as `joined`, `facts` and `needs`."""
    with joined(address) as ray:
        wanted = {job: needs(ray, job) for job in todo}
        known = [facts(ray, device) for device in {job.cell.config.device for job in todo}]
        yield jobs.Executor({name: found for nodes in known for name, found in nodes.items()},
                            min((slots(ray, own) for own in wanted.values()), default=1),
                            lambda tick: _each(ray, sweep, wanted, root, tick))


def _each(ray: Any, sweep: Sweep, wanted: dict[Job, dict[str, float]], root: Path,
          tick: Callable[[], object]) -> Generator[tuple[Job, finished.Entry], None, None]:
    text, task = sweep.notebook.read_text(encoding="utf-8"), ray.remote(perform)
    pending = {task.options(max_retries=0, **own).remote(text, jobs.request(sweep, job)): job
               for job, own in wanted.items()}
    try:
        while pending:
            tick()
            for answer in ray.wait(list(pending), timeout=0.5)[0]:
                job = pending.pop(answer)
                try:
                    entry = keep(ray.get(answer, timeout=START_S), root)
                except (ray.exceptions.RayError, RunError, OSError) as error:  # a node that is lost, above all
                    entry = finished.Entry(root, "failed", f"{type(error).__name__}: {_last(error)}", None)
                yield job, entry
    finally:
        for answer in pending:
            ray.cancel(answer)


def needs(ray: Any, job: Job) -> dict[str, float]:
    """What Ray sets apart for a job: one GPU where it uses one, else all CPUs of a node, since times would be disturbed
    by a neighbour. Raises: SweepError for a GPU that the cluster has not, or that is asked for by number."""
    device = job.cell.config.device
    nodes = _nodes(ray, device)
    if device not in ("auto", "cpu", "cuda"):
        raise SweepError(f"device is {device!r}", "a cluster chooses the GPU", "use 'cuda'")
    if not nodes:
        raise SweepError("the cluster has no GPU", f"{job.cell.label}: device {device!r}", "use 'auto' or 'cpu'")
    if device != "cpu" and _gpus(nodes[0]):
        return {"num_gpus": 1, "num_cpus": 1}
    return {"num_cpus": max(node["Resources"].get("CPU", 1) for node in nodes)}


def slots(ray: Any, wanted: dict[str, float]) -> int:
    """How many jobs that need this the cluster runs at a time."""
    total = ray.cluster_resources()
    return max(1, int(total["GPU"] if "num_gpus" in wanted else total.get("CPU", 0) // wanted["num_cpus"]))


def _nodes(ray: Any, device: str) -> list[Any]:
    """The nodes that serve a device: those with a GPU for "cuda", and for "auto" where there are any."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    able = [node for node in alive if _gpus(node)]
    return alive if device == "cpu" or (device == "auto" and not able) else able


def _gpus(node: Any) -> float:
    return float(node["Resources"].get("GPU", 0))


def perform(notebook: str, request: dict[str, Any]) -> dict[str, Any]:
    """On a node: the job as on any machine, in a process and a store of its own, and every file of its run as bytes."""
    with tempfile.TemporaryDirectory(prefix="hybridlab-") as folder:
        path = Path(folder) / Path(request["notebook"]).name
        path.write_text(notebook, encoding="utf-8")
        entry = jobs.run({**request, "notebook": str(path), "scratch": folder}, Path(folder) / "runs")
        place = entry.path if (entry.path / finished.JOB).exists() else None
        files = {} if place is None else {file.relative_to(place).as_posix(): file.read_bytes()
                                          for file in sorted(place.rglob("*")) if file.is_file()}
        return {"machine": place and place.parent.name, "run": place and place.name, "files": files,
                "reason": entry.reason}


def keep(found: dict[str, Any], root: Path) -> finished.Entry:
    """A run that came back, whole and as its manifest says, in the store, or a `RunError`."""
    if not found["files"]:
        return finished.Entry(root, "failed", found["reason"], None)
    parts = (part for file in found["files"] for part in PurePosixPath(file).parts)
    for name in (found["machine"], found["run"], *parts):
        if not NAME.fullmatch(name.lstrip(".")) or ".." in name:
            raise RunError(f"a node sent a file named {name[:80]!r}", "", "do not trust this node")
    place = root / found["machine"] / found["run"]
    if place.exists():
        raise RunError(f"{place} is there already", "a run is never overwritten", "start the sweep again")
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".arriving-") as folder:
        whole = Path(folder) / place.name
        for name, content in found["files"].items():
            (whole / name).parent.mkdir(parents=True, exist_ok=True)
            atomic_write(whole / name, content)
        if (whole / MANIFEST).exists():
            verify(whole, load(whole / MANIFEST))
        os.replace(whole, place)
    return finished.state(place)


def _last(error: Exception) -> str:
    """The last line of an error that Ray sends with a whole traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
