"""A trace is made by the tool that is there, recorded as events, kept from latencies, and explained from its rows."""

import json
import os
import stat
import sys
import textwrap

import pytest

from hybridlab import committed, experiment, gaps, tracelab, tracetables
from hybridlab.config import TraceConfig
from hybridlab.errors import ConfigError, PromptError, RunError, TraceError

CONFIG = {"arms": ["eager", "graph"], "length": 5, "traced_tokens": 4, "warmup": 1, "device": "cpu"}
FAKE = """#!{python}
import json, os, sqlite3, sys
with open({log!r}, "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
made = sys.argv[sys.argv.index("-o") + 1]
if sys.argv[1] == "profile":
    open(made, "w").write("report")
else:
    db = sqlite3.connect(made)
    db.execute("CREATE TABLE StringIds (id INTEGER, value TEXT)")
    db.execute("CREATE TABLE NVTX_EVENTS (start INTEGER, end INTEGER, eventType INTEGER, text TEXT, globalTid INTEGER, "
               "domainId INTEGER, int64Value INTEGER)")
    db.execute("CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER, end INTEGER, deviceId INTEGER, "
               "streamId INTEGER, correlationId INTEGER, shortName INTEGER, demangledName INTEGER, "
               "graphNodeId INTEGER)")
    db.execute("CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER, end INTEGER, globalTid INTEGER, "
               "correlationId INTEGER, nameId INTEGER)")
    db.executemany("INSERT INTO StringIds VALUES (?, ?)", [(1, "gemv"), (2, "cudaGraphLaunch_v10000")])
    db.execute("INSERT INTO NVTX_EVENTS VALUES (0, NULL, 75, 'hybridlab', 7, 3, NULL)")
    db.execute("INSERT INTO NVTX_EVENTS VALUES (1000, 9000, 59, 'decode', 7, 3, 6)")
    db.execute("INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (2000, 3000, 7, 11, 2)")
    db.execute("INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (4000, 6000, 0, 7, 11, 1, 1, 5)")
    db.commit()
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HYBRIDLAB_RUN", raising=False)
        return tracelab.run(CONFIG, root=tmp_path_factory.mktemp("runs"), progress=False)


def test_every_arm_and_token_is_in_the_trace(result):
    """A token that the profiler missed, or an arm under another's name, would explain nothing."""
    assert result.status == "complete"
    assert result.tool == "torch"
    assert list(result.traces()) == ["eager", "graph"]
    for name, table in result.tokens().items():
        assert table["category"].tolist() == ["prefill", "decode", "decode", "decode"]
        assert table["position"].tolist() == [5, 6, 7, 8]
        ranges = set(result.traces()[name].query("kind == 'range'")["category"])
        assert {"eager": "eager", "graph": "replay"}[name] in ranges
    assert "traces hold" not in result.reading()
    assert [row[0] for row in tracetables.grid(result.tokens(), "").rows] == ["eager", "graph"]


def test_the_trace_can_be_opened_elsewhere(result):
    """What Perfetto shows must be the rows, not a second measurement."""
    import gzip

    found = json.loads(gzip.decompress(result.perfetto.read_bytes()))["traceEvents"]
    assert sum(event["ph"] == "X" for event in found) == len(result.rows)
    assert result.perfetto.name in json.loads((result.path / "manifest.json").read_text())["files"]


def test_no_traced_row_becomes_a_latency(result):
    """A profiler doubles a launch; its rows must not open as those of an ablation."""
    with pytest.raises(RunError, match="is of kind trace"):
        experiment.Result.open(result.path)


def test_bad_input_is_refused_before_anything_is_written(tmp_path):
    """A tool that is not there, or a request that does not fit, is known before a model is loaded."""
    for wrong, error in (({"tool": "nsys"}, ConfigError), ({"length": 10_000}, PromptError),
                         ({"arms": ["x"]}, ConfigError)):
        with pytest.raises(error):
            tracelab.run(CONFIG | wrong, root=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def fake_nsys(folder, monkeypatch, text=FAKE):
    log, tool = folder / "log", folder / "nsys"
    tool.write_text(text.format(python=sys.executable, log=str(log)))
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return log


def test_nsys_is_asked_for_every_node_of_a_graph_and_only_while_it_should_look(tmp_path, monkeypatch):
    """Without node level a replay is one bar; without the range of the capture API warm-up drowns the token."""
    log = fake_nsys(tmp_path, monkeypatch)
    config = tracelab.checked(CONFIG)
    found = tracelab._under_nsys(config, "graph", tmp_path)
    profile, export = map(json.loads, log.read_text().splitlines())
    assert {"--cuda-graph-trace=node", "--trace=cuda,nvtx", "--capture-range=cudaProfilerApi"} <= set(profile)
    assert json.loads(profile[-1])["name"] == "graph"
    assert export[:2] == ["export", "--type=sqlite"]
    assert (tmp_path / "graph.nsys-rep").exists()
    (token,) = tracetables.grid({"graph": gaps.by_token(found)}, "").rows
    assert token[:2] == ["graph", "1"]
    assert found.set_index("kind")["name"].to_dict() == {"range": "decode", "launch": "cudaGraphLaunch",
                                                         "kernel": "gemv"}


def test_nsys_is_chosen_where_it_is_and_the_device_is_a_gpu(tmp_path, monkeypatch):
    """On a CPU it sees no operations, and a trace without work explains nothing."""
    fake_nsys(tmp_path, monkeypatch)
    assert tracelab.choose_tool(TraceConfig(device="cpu")) == "torch"
    with pytest.raises(ConfigError, match="the device is a CPU"):
        tracelab.choose_tool(TraceConfig(device="cpu", tool="nsys"))
    monkeypatch.setattr(tracelab.models, "resolve_device", lambda _: tracelab.torch.device("cuda"))
    assert tracelab.choose_tool(TraceConfig()) == "nsys"
    assert tracelab.choose_tool(TraceConfig(tool="torch")) == "torch"


def test_an_nsys_that_fails_is_named_with_its_words(tmp_path, monkeypatch):
    """A report that was never made must not be read as an empty one."""
    fake_nsys(tmp_path, monkeypatch, textwrap.dedent("""\
        #!{python}
        # {log}
        import sys
        sys.exit("no permission for counters")
        """))
    with pytest.raises(TraceError, match=r"nsys profile made no nsys-rep file .* no permission for counters"):
        tracelab._under_nsys(tracelab.checked(CONFIG), "graph", tmp_path)


def test_figures_of_a_committed_trace_are_drawn_again(result, tmp_path):
    """A figure that its rows cannot make again is a picture."""
    assert {path.name for path in committed._draw_trace(result, tmp_path)} == {
        f"trace_{name}.{ending}" for name in ("shares", "token") for ending in ("svg", "png")}
