"""Published numbers as data: each known cell has a source, each unknown one is empty, and a broken file is refused."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path

import pandas as pd
import pytest

from hybridlab import published
from hybridlab.config import PAPER_LENGTHS
from hybridlab.errors import ConfigError
from hybridlab.judging import JUDGES


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The folder, to be broken."""
    return Path(shutil.copytree(published.folder(), tmp_path / "paper"))


def test_every_table_is_there_with_its_sources() -> None:
    """A number without a source cannot be told from one that was made up."""
    files = {path.stem for path in published.folder().glob("*.csv")}
    assert files == set(published.TABLES)
    for name in published.TABLES:
        cells = published.table(name)
        known = cells["value"].notna()
        assert known.any()
        assert (cells.loc[known, "source"] != "").all()
        assert (cells.loc[~known, "source"] == "").all()
        owner = {"R"} if name.startswith("repository") else set(published.SOURCES) - {"R"}
        assert {text.split()[0] for text in cells.loc[known, "source"]} <= owner, "the repository's are not the paper's"


def test_known_and_unknown_cells_are_those_of_the_note() -> None:
    """A typing error in a published number, or an unknown cell that was filled in."""
    first = published.table("table1").dropna(subset=["value"])
    assert {(one.system, one.tokens, one.value) for one in first.itertuples()} == {
        ("Hybrid", 10, 13.36), ("TensorRT-LLM", 10, 16), ("Hybrid", 100, 11.09), ("TensorRT-LLM", 100, 28),
        ("Hybrid", 500, 17.79), ("TensorRT-LLM", 500, 88), ("HuggingFace eager", 500, 48.96)}
    second = published.table("table2").dropna(subset=["value"])
    assert {(one.system, one.tokens, one.value) for one in second.itertuples()} == {
        ("Hybrid", 350, 18.90), ("TensorRT-LLM", 350, 16.53), ("Hybrid", 500, 23.68), ("TensorRT-LLM", 500, 16.65)}
    for name in ("table1", "table2", "repository_ttft", "repository_p99"):
        assert tuple(published.table(name)["tokens"].drop_duplicates()) == PAPER_LENGTHS
    cells = published.table("repository_ttft")
    base = cells[(cells["system"] == "base") & (cells["edition"] == "HEAD") & (cells["tokens"] == 10)].iloc[0]
    assert (base["value"], base["spread"], base["source"]) == (89.21, 142.13, "R README.md:53-65")
    assert cells.loc[cells["note"].str.startswith("A straight line"), "value"].tolist() == [22.3, 28.6, 31.75, 34.9]


def test_the_readme_names_every_file_and_source() -> None:
    """A file or an id that a reader cannot look up."""
    text = (published.folder() / "README.md").read_text()
    assert all(f"`{path.name}`" in text for path in published.folder().iterdir() if path.name != "README.md")
    assert all(f"\n| {source} |" in text for source in published.SOURCES)


@pytest.mark.parametrize(("old", "new", "message"), [
    ("13.36,,ms,S2 S3,secondary", "13.36,,ms,,secondary", "line 2 of table1.csv has a value"),
    ("13.36,,ms,S2 S3,secondary", ",,ms,S2 S3,secondary", "line 2 of table1.csv has no value"),
    ("13.36,,ms,S2 S3", "13.36,,ms,S9", "source 'S9'"), ("13.36,,ms,S2 S3", "13.36,,ms,R", "source 'R'"),
    ("13.36", "13.3x6", "no finite number"), ("13.36", "nan", "no finite number"),
    ("ttft,TensorRT-LLM,10,", "ttft,Hybrid,10,", "line 3 of table1.csv is a cell that is there already"),
    ("quantity,system", "system,quantity", "names the columns"), ("Hybrid,10,", "Hybrid,ten,", "'ten' tokens"),
    ("secondary,", "hearsay,", "trust 'hearsay'"), ("Hybrid,10,v1", "Hybrid,10,v1,v2", "11 fields"),
])
def test_a_broken_table_is_refused(copy: Path, old: str, new: str, message: str) -> None:
    """A published number that lost its source, or became another, would be shown as published."""
    path = copy / "table1.csv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message):
        published.table("table1", copy)


def test_a_missing_table_and_cell_are_refused(tmp_path: Path) -> None:
    """An empty table would look like a paper without numbers, and an unknown cell like a zero."""
    with pytest.raises(ConfigError, match="cannot be read"):
        published.table("table1", tmp_path)
    with pytest.raises(ConfigError, match="unknown"):
        published.table("table3")
    for cell in (["table1", "ttft", "Hybrid", 50], ["table1", "ttft", "Nobody", 10], ["table1", "ttft", "Hybrid"]):
        with pytest.raises(ConfigError, match="one that is known was expected"):
            published.value(cell)
    assert published.value(["ablations", "ttft increase", "without asynchronous graph regeneration"]) == 0.175


def test_every_claim_fits_its_judge_and_cites_cells_that_are_known() -> None:
    """A claim whose rule names a cell or a setting that is not there would only fail after hours of measuring."""
    claims = published.claims()
    assert len(claims) >= 20
    for claim in claims:
        taken = set(inspect.signature(JUDGES[claim.judge]).parameters) - {"evidence"}
        assert set(claim.settings) <= taken, claim.id
        for cell in (value for value in claim.settings.values() if isinstance(value, list)):
            assert pd.notna(published.value(cell)), claim.id


@pytest.mark.parametrize(("old", "new", "message"), [
    ('id = "kv-update"', 'id = "precapture"', "'precapture' is there twice"),
    ('source = "S5"', 'source = "hearsay"', "source 'hearsay'"), ('needs = "any"', 'needs = "luck"', "luck"),
    ('rule = "Some step ran outside of a graph, at 50 positions or more."', 'rule = ""', "length >= 1"),
    ("[[claim]]", "[[claim]", "cannot be"),
    ('judge = "replayed"', 'jugde = "replayed"', "unknown field|missing required"),
])
def test_a_broken_claim_is_refused(copy: Path, old: str, new: str, message: str) -> None:
    """A claim without a rule, or with one that nobody reads, has no honest verdict."""
    path = copy / "claims.toml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ConfigError, match=message):
        published.claims(copy)
