"""Random input for everything that reads what comes from outside: it is read, or refused by the promised error.

The readers of files are also attacked by `make fuzz`, for longer; what that or these find stands in FOUND.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import msgspec
import nbformat
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hybridlab import config, parameters, records
from hybridlab.config import RunConfig, build
from hybridlab.errors import ConfigError, ModelError, NotebookError, PromptError, RunError
from tests.fuzz import targets

CLASSES = [config.Policy, config.Sampling, config.RuntimeConfig, *get_args(records.Config)]
MANY = os.environ.get("FUZZ_EXAMPLES")  # set by `make fuzz`; without it the same few each time
FEW = settings(max_examples=int(MANY or 60), derandomize=MANY is None, deadline=None, database=None,
               suppress_health_check=list(HealthCheck))

odd = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.integers(), st.sampled_from([2**31, 2**63, -2**63, 10**400]),
    st.floats(), st.text(max_size=8), st.binary(max_size=4),
    st.sampled_from(["tiny", "eager", "hybrid", "whole", "full", "exact", "cpu", "float16", "\ud800", "x" * 5000]))
values = st.recursive(odd, lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.tuples(inner, inner),
    st.dictionaries(st.one_of(st.text(max_size=5), st.integers(0, 2)), inner, max_size=3)), max_leaves=6)


@st.composite
def asked(draw: Any) -> tuple[type[msgspec.Struct], dict[Any, Any]]:
    """A config class, and values for some of its fields; now and then for one that it has not."""
    kind = draw(st.sampled_from(CLASSES))
    names = [field.name for field in msgspec.structs.fields(kind)]
    found = draw(st.dictionaries(st.sampled_from(names), values, max_size=3))
    return kind, found | draw(st.one_of(st.just({}), st.just({}), st.dictionaries(st.text(max_size=4), values)))


@FEW
@given(asked())
@example((config.Sampling, {"temperature": 10**400}))
@example((config.CacheConfig, {"compare": [{1: 2}]}))
@example((RunConfig, {"policy": [["attention"]]}))
@example((RunConfig, {"lengths": float("nan")}))
def test_any_values_make_a_config_or_a_config_error(given_: tuple[type[msgspec.Struct], dict[Any, Any]]) -> None:
    """A TypeError from the depths of a library; or a setting of a wrong type that reaches the runtime."""
    kind, found = given_
    try:
        made = build(kind, found)
    except ConfigError as error:
        targets.require_short(error)
    else:
        assert build(kind, config.as_dict(made)) == made
        assert msgspec.convert(msgspec.to_builtins(made), kind) == made


NOTEBOOK = nbformat.v4.new_notebook(cells=[
    nbformat.v4.new_code_cell("model = 'tiny'\nrepeats = 3\nlengths = [10, 50]\npolicy = 'whole'\ndevice = 'cpu'",
                              metadata={"tags": ["parameters"]}),
    nbformat.v4.new_code_cell("x = repeats")])
REFUSED = (NotebookError, ConfigError, PromptError, ModelError)


@FEW
@given(st.dictionaries(st.one_of(st.sampled_from(["model", "repeats", "lengths", "policy", "device"]),
                                 st.text(max_size=4)), values, max_size=3))
@example({"model": "~absent/x"})
@example({"model": "x" * 5000})
@example({"model": "a\0b"})
def test_any_parameters_are_taken_or_refused(found: dict[str, Any]) -> None:
    """A kernel started for a value that would arrive as another one, or a traceback for an answer."""
    try:
        made = parameters.settings(copy.deepcopy(NOTEBOOK), "x.ipynb", found)
    except REFUSED as error:
        targets.require_short(error)
    else:
        assert isinstance(made, RunConfig)
        arrived = json.loads(json.dumps(found))
        assert arrived == found, "a value that JSON would change"


@FEW
@given(st.one_of(st.text(max_size=60), st.builds(lambda name, value: f"{name} = {value!r}", st.text(max_size=5), odd)))
@example("repeats = " + "(" * 300 + ")" * 300)
@example("repeats = " + "-" * 5000 + "1")
@example("repeats = " + "9" * 5000)
@example("\0")
def test_any_parameters_cell_is_read_or_refused(source: str) -> None:
    """A parser driven into its limits by a notebook that somebody sent."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})])
    try:
        parameters.defaults(notebook, "x.ipynb")
    except REFUSED as error:
        targets.require_short(error)


json_like = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=5)


@FEW
@given(st.lists(st.tuples(st.sampled_from([targets.EVENT, targets.CALL]),
                          st.dictionaries(st.sampled_from([*targets.EVENT, "s"]), json_like, max_size=3),
                          st.dictionaries(st.sampled_from(list(targets.EVENT["args"])), json_like, max_size=3)),
                max_size=4))
def test_any_events_are_a_trace_or_refused(found: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]) -> None:
    """An OverflowError, or a table whose events end before they start."""
    events = [event | {"args": event["args"] | arguments} | changes for event, changes, arguments in found]
    targets.kineto_file(json.dumps({"traceEvents": events}).encode())


cell = st.one_of(st.none(), st.integers(-2**63, 2**63 - 1), st.floats(), st.text(max_size=6).filter(
    lambda text: not any("\ud800" <= letter <= "\udfff" for letter in text)), st.binary(max_size=6))


@FEW
@given(st.fixed_dictionaries({name: st.lists(st.dictionaries(st.sampled_from(list(rows[0])), cell, max_size=3),
                                             min_size=1, max_size=3) for name, rows in targets.TABLES.items()}))
def test_any_values_in_an_export_are_a_trace_or_refused(changes: dict[str, list[dict[str, Any]]]) -> None:
    """A value of a type that no version of nsys writes, which SQLite keeps in any column."""
    targets.nsys_tables({name: [targets.TABLES[name][0] | change for change in rows] for name, rows in changes.items()})


@pytest.mark.parametrize("value", [None, 5, b"\xff", 2.5])
def test_a_name_of_another_type_is_no_name(value: Any) -> None:
    """A call, a kernel or a range whose name is a number, which SQLite allows in any column."""
    ranges = [row | {"text": value} for row in targets.TABLES["NVTX_EVENTS"]]
    targets.nsys_tables(targets.TABLES | {"StringIds": [{"id": 1, "value": value}], "NVTX_EVENTS": ranges})


@FEW
@given(st.sampled_from(["kineto_file", "nsys_file", "weights", "index", "config", "requests"]), st.data())
def test_any_bytes_are_read_or_refused(name: str, data: Any) -> None:
    """A file of any content that ends in anything else than a result or the promised error."""
    sound = {"kineto_file": targets.TRACE.encode(), "nsys_file": targets.database(), "weights": targets.WEIGHTS,
             "index": targets.INDEX.encode(), "config": targets.CONFIG.encode(),
             "requests": targets.REQUESTS.encode()}[name]
    content = bytearray(sound)
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, len(sound) - 1), st.integers(0, 255)), max_size=5)):
        content[at] = byte
    getattr(targets, name)(bytes(content)[:data.draw(st.one_of(st.just(len(sound)), st.integers(0, len(sound))))])


# Inputs that once ended in another way, by the target that they broke.
FOUND: list[tuple[Callable[[bytes], None], bytes]] = [
    (targets.config, b'{"model_type": "llama", "hidden_size": 1e400}'),
    (targets.nsys_file, targets.database().replace(b"CREATE TABLE", b"CREATE \xa0ABLE", 1)),
    (targets.weights, (2**62).to_bytes(8, "little") + b"{}"),
]


@pytest.mark.parametrize("number", range(len(FOUND)))
def test_what_was_found_stays_refused(number: int) -> None:
    """A fault that was mended once and comes back."""
    target, data = FOUND[number]
    target(data)


# --- run directories --------------------------------------------------------------------------------------------------

ROW = {"round": 0, "request": 0, "arm": "eager", "policy": "whole", "prompt_tokens": 10, "bucket": None, "index": 0,
       "position": 10, "metric": "ttft", "ms": 1.5, "path": "eager", "reason": "", "captures": 0, "compiles": 0,
       "process": 0, "device_ms": None, "client_ms": None, "ended_ns": 10, "happened": "", "happened_ms": 0.0,
       "profiled": False}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run that is complete, and one that was never finished."""
    root, found = tmp_path_factory.mktemp("runs"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(records.RUN_VARIABLE, raising=False)
        patch.setattr(records.environment, "report", lambda: {"gpu": [], "cpu": "Test CPU", "machine": "cpu-test"})
        for name in ("complete", "incomplete"):
            run = records.Run.create(RunConfig(lengths=(10,), arms=("eager",)), root, run_id=name)
            run.append([ROW, ROW | {"request": 1}])
            if name == "complete":
                run.finish("complete")
            found[name] = run.path
    return found


DAMAGE: dict[str, Callable[[Path, Any], None]] = {
    "bytes": lambda file, draw: file.write_bytes(bytes(
        byte ^ draw(st.integers(0, 255)) if draw(st.integers(0, 99)) == 0 else byte for byte in file.read_bytes())),
    "cut": lambda file, draw: os.truncate(file, draw(st.integers(0, file.stat().st_size))),
    "json": lambda file, draw: file.write_text(json.dumps(draw(json_like))),
    "field": lambda file, draw: _with_field(file, draw),
    "gone": lambda file, draw: file.unlink(),
    "folder": lambda file, draw: (file.unlink(), file.mkdir()),
    "link": lambda file, draw: (file.unlink(), file.symlink_to("/dev/null")),
    "zero": lambda file, draw: (file.unlink(), file.symlink_to("/dev/zero")),
    "fifo": lambda file, draw: (file.unlink(), os.mkfifo(file)),
    "circle": lambda file, draw: (file.unlink(), file.symlink_to(file.name)),
}


def _with_field(file: Path, draw: Any) -> None:
    try:
        found = json.loads(file.read_text())
    except ValueError:
        found = {}
    if isinstance(found, dict) and found:
        found[draw(st.sampled_from(sorted(found)))] = draw(json_like)
        file.write_text(json.dumps(found))


@FEW
@given(data=st.data())
def test_any_damage_to_a_run_is_seen(recorded: dict[str, Path], data: Any) -> None:
    """A run that somebody sent, or that a disk damaged, shown as complete with other rows, or not shown with a
    traceback."""
    which = data.draw(st.sampled_from(sorted(recorded)))
    with targets.folder() as made:
        copy_ = made / which
        shutil.copytree(recorded[which], copy_)
        before = records.read(copy_)
        file = data.draw(st.sampled_from(sorted(path for path in copy_.rglob("*") if path.is_file())))
        DAMAGE[data.draw(st.sampled_from(sorted(DAMAGE)))](file, data.draw)
        try:
            found = records.read(copy_)
        except (RunError, ConfigError) as error:
            targets.require_short(error)
        else:
            if found.status == "complete":
                assert found.rows.equals(before.rows)
                assert found.config == before.config
