"""Throughput of a request stream is tokens over the time that serving them took, and nothing else."""

import pandas as pd
import pytest

from hybridlab import tallies
from hybridlab.errors import StatisticsError


def rows(*made):
    columns = ["setting", "round", "request", "metric", "ms"]
    return pd.DataFrame(made, columns=columns).assign(run_id="r", part="stream")


def test_throughput_is_tokens_over_the_time_of_requests():
    """Building a runtime counted in would make short streams slow; a wait after a request left out, captures free."""
    found = tallies.throughput(rows(
        ("a", 0, None, "start", 9000.0), ("a", 0, 0, "ttft", 60.0), ("a", 0, 0, "itl", 20.0),
        ("a", 0, 0, "after", 20.0),
        ("a", 0, 1, "ttft", 90.0), ("a", 0, 1, "after", 10.0), ("a", 0, None, "settle", 5000.0),
        ("a", 1, 0, "ttft", 500.0), ("a", 1, 0, "itl", 500.0), ("b", 0, 0, "ttft", 250.0)))
    assert found.to_dict("records") == [
        {"setting": "a", "passes": 2, "tokens_per_s": 8.5, "least": 2.0, "most": 15.0},
        {"setting": "b", "passes": 1, "tokens_per_s": 4.0, "least": 4.0, "most": 4.0}]


def test_rows_without_a_stream_have_no_throughput():
    """A number made of nothing would look like a slow stream."""
    with pytest.raises(StatisticsError, match="no rows of part 'stream'"):
        tallies.throughput(rows(("a", 0, 0, "ttft", 1.0)).assign(part="cost"))


def test_a_sentence_names_every_setting():
    """A setting that is left out cannot be compared."""
    words = tallies.throughput_words(rows(("b", 0, 0, "ttft", 250.0), ("a", 0, 0, "ttft", 500.0)))
    assert words == "Tokens a second, captures and waits included: a 2, b 4."
