"""A run from config to manifest, over a fake model and runtime: how it ends is what the manifest says."""

import contextlib
import logging
from types import SimpleNamespace

import pytest
import torch

from hybridlab import experiment, records
from hybridlab.config import RunConfig
from hybridlab.errors import ConfigError, PromptError, RunError

CONFIG = {"arms": ["eager", "hybrid"], "lengths": [4, 7], "repeats": 6, "new_tokens": 9, "warmup": 1, "device": "cpu"}


FLOORS = [{"metric": "ttft", "prompt_tokens": n, "position": None, "bytes": 1e6, "flops": 1e6, "ms": 1.0,
           "bound": "memory"} for n in (4, 7)] + [
    {"metric": "itl", "prompt_tokens": 4, "position": n, "bytes": 1e6, "flops": 1e6, "ms": 0.5, "bound": "memory"}
    for n in (5, 15)]


class Runtime:
    """Half the time in hybrid; `hook` runs at each request; open runtimes are counted."""

    alive, closed = 0, False

    def __init__(self, model, arm, **settings):
        self.arm, self.settings, self.captures, self.served, self.threads = arm, settings, 0, 0, torch.get_num_threads()
        self.counters = SimpleNamespace(as_dict=lambda: {"captures": self.captures, "compiles": 0})

    def hook(self):
        pass

    def __enter__(self):
        type(self).alive += 1
        return self

    def __exit__(self, *_):
        type(self).alive -= 1

    def warm_up(self, lengths, **sampling):
        assert not self.closed

    @contextlib.contextmanager
    def sealed(self):
        self.closed = True
        yield
        self.closed = False

    def generate(self, prompt, max_new_tokens, each=lambda: None, **options):
        self.served += 1
        self.hook()
        for _ in range(max_new_tokens):
            each()
        ms = (1.0 if self.arm == "hybrid" else 2.0) + self.served / 1000
        return SimpleNamespace(ids=[5] * max_new_tokens, ttft_ms=10 * ms, itl_ms=[ms] * (max_new_tokens - 1),
                               paths=["graph" if self.arm == "hybrid" else "eager"] * max_new_tokens,
                               reasons=[""] * max_new_tokens, bucket=None, device_ms=[],
                               client_ms=[], seen=None)


class Model:
    tokenizer = None
    dtype, device = torch.float16, torch.device("cpu")
    config = SimpleNamespace(vocab_size=50, bos_token_id=1, max_position_embeddings=64)
    config.get_text_config = lambda: Model.config

    def parameters(self):
        return iter([torch.zeros(1)])


@pytest.fixture(autouse=True)
def _fakes(monkeypatch, tmp_path):
    monkeypatch.delenv(records.RUN_VARIABLE, raising=False)
    monkeypatch.setenv("HYBRIDLAB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(experiment, "Runtime", Runtime)
    monkeypatch.setattr(experiment.models, "load", lambda spec, *, device, dtype: Model())
    monkeypatch.setattr(experiment.roofline, "measure", lambda device, dtype, working_set: {"read_gbs": 10.0})
    monkeypatch.setattr(experiment.roofline, "work", lambda model, context: SimpleNamespace(bytes=1000))
    monkeypatch.setattr(experiment.roofline, "of_run", lambda model, lengths, new_tokens, rates: {
        "limits": rates, "floors": FLOORS})
    monkeypatch.setattr(Runtime, "hook", lambda runtime: None)
    monkeypatch.setattr(Runtime, "alive", 0)


@pytest.mark.parametrize(("dtype", "status"), [(torch.float32, "failed"), (torch.float16, "complete")])
def test_arms_that_disagree_are_not_timed(tmp_path, monkeypatch, dtype, status):
    """A speed-up over wrong tokens: in float32 arms must agree; in half precision a near-tie may fall either way."""
    answer = Runtime.generate

    def wrong(runtime, prompt, max_new_tokens, **options):
        out = answer(runtime, prompt, max_new_tokens, **options)
        out.ids[-1] += runtime.arm == "hybrid"
        return out

    monkeypatch.setattr(Model, "dtype", dtype)
    monkeypatch.setattr(Runtime, "generate", wrong)
    if status == "complete":
        experiment.run(CONFIG)
    else:
        with pytest.raises(RunError, match="greedy tokens of hybrid differ from those of eager"):
            experiment.run(CONFIG)
    recorded = only_run(tmp_path)
    assert recorded.status == status
    assert (len(recorded.rows) == 0) == (status == "failed")


def only_run(tmp_path):
    (path,) = (tmp_path / "runs").glob("*/*")
    return records.read(path)


def test_a_run_is_recorded_and_told_in_words(tmp_path):
    """The paragraph under a figure must hold the numbers of the rows, and say that CPU ratios are not GPU ratios."""
    result = experiment.run(CONFIG | {"itl_repeats": 3})
    assert result.status == "complete"
    assert result.path.is_relative_to(tmp_path / "runs")
    assert len(result.rows) == 6 * 4 + 3 * 4 * 8
    table = result.table()
    cell = table[(table["arm"] == "hybrid") & (table["metric"] == "itl") & (table["prompt_tokens"] == "all")].iloc[0]
    words = result.reading()
    assert f"{cell['p50']:.3g} ms" in words
    assert f"hybrid is {cell['ratio_to_eager']:.3g} [" in words
    assert "eager ran 100 % eager; hybrid ran 100 % graph" in words
    assert "not GPU ratios" in words
    assert "Rounds that warmed up: 1, where 20 are usual." in words
    first = table[(table["arm"] == "eager") & (table["metric"] == "ttft") & (table["prompt_tokens"] == 4)].iloc[0]
    assert (first["limit"], first["of_limit"]) == (1.0, pytest.approx(1 / 20, rel=0.1))
    assert "n = 368" in words  # 96 gaps give no p99
    assert "allow, 0.5 ms a token, the share reached is 2" in words
    assert result.run_id in result.caption
    assert "24 first tokens" in result.caption
    again = experiment.Result.open(result.path)
    assert again.reading() == words
    assert again.rows.equals(result.rows)
    assert Runtime.alive == 0


def test_memory_that_failed_captures_keep_is_told(monkeypatch):
    """Runs recorded in a process that lost memory for good, of which only a log knows."""
    monkeypatch.setattr(experiment.pools, "lost_bytes", lambda: 4096)
    result = experiment.run(CONFIG)
    assert result.recorded.extra["lost"].startswith("captures that failed keep 4,096 bytes of the GPU")
    assert result.recorded.extra["lost"] in result.reading()
    monkeypatch.undo()
    assert experiment.Result.open(result.path).reading() == result.reading()


@pytest.mark.parametrize(("change", "error"), [
    ({"lenghts": [4]}, ConfigError), ({"arms": ["hybrd"]}, ConfigError), ({"lengths": [4, 4]}, ConfigError),
    ({"arms": ["eager", "eager"]}, ConfigError), ({"steps": [1, 1], "policy": "full"}, ConfigError),
    ({"steps": 8}, ConfigError), ({"steps": [1, 65], "policy": "full"}, ConfigError),
    ({"steps": [1, 8], "policy": "full"}, ConfigError), ({"lengths": [60]}, PromptError),
])
def test_bad_input_is_refused_before_anything_is_written(tmp_path, change, error):
    """An empty run directory for each typo would bury the real runs."""
    with pytest.raises(error):
        experiment.run(CONFIG | change)
    assert not (tmp_path / "runs").exists()


def test_an_instance_of_the_config_is_checked_too(tmp_path):
    """A RunConfig made by hand is not validated by its constructor."""
    with pytest.raises(ConfigError):
        experiment.run(RunConfig(repeats=0))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt(), SystemExit(0)])
def test_whatever_stops_a_run_leaves_it_failed_with_its_rounds(tmp_path, monkeypatch, error):
    """A run that was interrupted after three rounds is no result, and its three rounds are not lost."""

    def hook(runtime):
        if runtime.served > 2 * 2 + 2 * 2 + 3 * 2:  # warm-up, then a round with ITL, then three of TTFT only
            raise error

    monkeypatch.setattr(Runtime, "hook", hook)
    with pytest.raises(type(error)):
        experiment.run(CONFIG)
    found = only_run(tmp_path)
    assert found.status == "failed"
    assert type(error).__name__ in found.reason
    assert sorted(found.rows["round"].unique()) == [0, 1, 2, 3]
    assert Runtime.alive == 0


def test_a_capture_inside_a_timed_request_fails_the_run(tmp_path, monkeypatch):
    """Its time is the time of capturing, and would become the p99 of the arm."""

    def hook(runtime):
        runtime.captures += runtime.arm == "hybrid" and runtime.served == 7

    monkeypatch.setattr(Runtime, "hook", hook)
    with pytest.raises(RunError, match="1 captures and 0 compilations"):
        experiment.run(CONFIG)
    assert only_run(tmp_path).status == "failed"


def test_a_full_disk_does_not_hide_the_first_error(tmp_path, monkeypatch):
    """When the manifest cannot be written either, the person must still see what went wrong first."""

    def broken(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(records.Run, "append", broken)
    monkeypatch.setattr(records.Run, "finish", lambda *_, **__: broken())
    with pytest.raises(OSError, match="no space") as caught:
        experiment.run(CONFIG)
    assert "could not be marked failed" in caught.value.__notes__[0]
    assert only_run(tmp_path).status == "incomplete"


def test_threads_are_set_recorded_and_restored():
    """Another thread count is another experiment; leaving it changed would disturb the next one."""
    before = torch.get_num_threads()
    result = experiment.run(CONFIG | {"threads": before + 1})
    assert result.recorded.environment["torch_threads"] == before + 1
    assert torch.get_num_threads() == before


def test_progress_in_a_log_is_a_line_now_and_then(caplog):
    """Under papermill or in a pipe a redrawn bar would fill the log."""
    with caplog.at_level(logging.INFO, logger="hybridlab.progress"):
        experiment.run(CONFIG, progress=False)
    assert 1 <= len(caplog.records) <= 3
