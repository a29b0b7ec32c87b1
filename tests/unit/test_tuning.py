"""Tuned tiles: which table and line a kernel takes, damaged tables, and the search with a clock that is given."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from hybridlab import cli, models, paths, tiles, tune, tuning
from hybridlab.errors import ConfigError, MeasureError
from hybridlab.kernels import gemm, gemv
from hybridlab.tiles import Found, Product, Weights
from hybridlab.tuning import COLUMNS, DEFAULTS, LIBRARY, Entry, Tile

GPU = "a-gpu"
TINY = Product("project", 12, 32, (8, 2, 2))
FAST, SLOW = Tile(16, 32, 1), Tile(32, 16, 1)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def entry(**changes: Any) -> Entry:
    fields = {"op": "project", "tokens": 1, "rows": 100, "depth": 64, "dtype": "float16", "tile_rows": 4,
              "tile_columns": 64, "warps": 2, "stages": 1, "us": 2.0, "share": 0.5, "timings": 7,
              "date": date(2026, 1, 2), "torch": "2.11.0+cu130", "triton": "3.6.0"} | changes
    size = tuning.weight_bytes(tuple(fields[name] for name in ("op", "tokens", "rows", "depth", "dtype")))
    return Entry(**{"gbs": size / fields["us"] / 1e3} | fields)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Where tables lie, empty; nothing read from it is remembered afterwards."""
    monkeypatch.setattr(tuning, "data_dir", lambda: tmp_path)
    monkeypatch.setattr(tuning, "gpu", lambda _: GPU)
    (tmp_path / "tuning").mkdir()
    tuning.forget()
    yield tmp_path / "tuning"
    tuning.forget()


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["tune", *arguments], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


# ---- which tile ------------------------------------------------------------------------------------------------------

def test_only_the_very_same_product_takes_a_tuned_tile(folder: Path) -> None:
    """A tile measured for other rows, depth, dtype or op, taken because it is near."""
    tune.keep(GPU, [entry()])
    assert tuning.tile("project", 1, 100, 64, "float16", 0) == Tile(4, 64, 2)
    for op, rows, depth, dtype in (("residual", 100, 64, "float16"), ("project", 101, 64, "float16"),
                                   ("project", 100, 65, "float16"), ("project", 100, 64, "bfloat16")):
        assert tuning.tile(op, 1, rows, depth, dtype, 0) == DEFAULTS[op]
    assert tuning.tile("project", 2, 100, 64, "float16", 0) == tuning.default("project", 16, 100, "float16")


def test_a_table_is_read_once_and_its_absence_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system call in every launch."""
    reads: list[Path] = []
    monkeypatch.setattr(tuning, "read", lambda file: reads.append(file) or {})
    for rows in (1, 2, 1, 2):
        tuning.tile("swiglu", 1, rows, 64, "float16", 0)
    assert reads == [folder / f"{GPU}.csv"]


def test_a_kernel_asks_for_all_rows_it_reads_on_a_gpu_and_not_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lookup by the rows of the queries alone, which `hybridlab tune` never writes, or a GPU asked for on a CPU."""
    asked: list[tuple] = []
    monkeypatch.setattr(tuning, "tile", lambda *key: asked.append(key) or FAST)
    weight = SimpleNamespace(is_cuda=True, shape=(8, 32), dtype=torch.bfloat16, device=torch.device("cuda", 3))
    assert gemv._tuned("project", 5, 12, weight) == FAST
    assert gemv._tuned("swiglu", 1, 12, torch.zeros(8, 32)) == FAST
    assert asked == [("project", 5, 12, 32, "bfloat16", 3), ("swiglu", 1, 12, 32, "float32", None)]
    seen: list[tuple] = []
    for kernels in (gemv, gemm):
        monkeypatch.setattr(kernels, "_tuned", lambda *key: seen.append(key[:3]) or Tile(16, 32, 1))
    for tokens in (1, 17):
        for product in (TINY, Product("swiglu", 6, 32, (6, 6)), Product("residual", 5, 32, (5,))):
            launch = Weights(product._replace(tokens=tokens), torch.float32, DEVICE, 1, pdl=False).launches(FAST)[0]
            launch.func(*launch.args)
    assert seen == [(op, tokens, rows) for tokens in (1, 17) for op, rows in (
        ("project", 12), ("swiglu", 6), ("residual", 5))]


def test_names_of_tables() -> None:
    """Two GPUs under one name, or a name that leaves the folder."""
    assert tuning.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3" != tuning.slug("NVIDIA H100 PCIe")
    for name in ("../../etc", "", "NVIDIA H200"):
        with pytest.raises(ConfigError, match="is no name of a table"):
            tuning.path(name)


# ---- tables ----------------------------------------------------------------------------------------------------------

def test_shipped_tables_are_sound_and_serve_the_published_models() -> None:
    """A shipped table that is refused on first use, or whose lines no model asks for."""
    files = sorted((paths.data_dir() / "tuning").glob("*"))
    assert [file.name for file in files if tuning.slug(file.stem) + ".csv" != file.name] == []
    assert all(tuning.read(file) for file in files)
    _, words, missing = tune.coverage("random:llama-2-7b", gpu="nvidia-h200")
    assert (missing, words.splitlines()[0]) == (0, "21 of 21 products have a tuned tile.")
    assert [found for file in files for found in tuning.read(file).values()
            if found.tile not in tiles.candidates(found.tokens)] == []
    library = {(key[1], found.tile == LIBRARY) for key, found in tuning.table("nvidia-h200").items()}
    assert {(16, False), (128, True)} <= library, "as README says"
    assert not {(16, True), (128, False)} & library


def test_what_is_written_is_read_again(folder: Path) -> None:
    """A rounded number, a date or a version that the check of the next start refuses."""
    every = [entry(op=op, rows=rows, us=us) for op, rows, us in (
        ("project", 100, 1.234), ("swiglu", 7, 3.0), ("residual", 151936, 120.777))]
    tune.keep(GPU, every)
    assert list(tuning.read(folder / f"{GPU}.csv").values()) == every


def test_other_products_stay_and_the_same_one_is_replaced(folder: Path) -> None:
    """Tuning a second model loses the first one's lines, or leaves two lines of one product."""
    tune.keep(GPU, [entry(), entry(op="swiglu")])
    assert tuning.tile("project", 1, 100, 64, "float16", 0) == Tile(4, 64, 2)
    tune.keep(GPU, [entry(tile_rows=8), entry(dtype="float32")])
    assert [(e.op, e.dtype, e.tile_rows) for e in tuning.read(folder / f"{GPU}.csv").values()] == [
        ("project", "float16", 8), ("swiglu", "float16", 4), ("project", "float32", 4)]
    assert tuning.tile("project", 1, 100, 64, "float16", 0) == Tile(8, 64, 2)
    assert [file.name for file in folder.iterdir()] == [f"{GPU}.csv"]


@pytest.mark.parametrize(("column", "value", "message"), [
    ("op", "gemm", "Invalid enum value 'gemm'"), ("rows", "0", ">= 1"), ("rows", "1.5", "int"), ("depth", "-4", ">= 1"),
    ("dtype", "int8", "Invalid enum value"), ("tile_rows", "3", "power of two from 1 to 128"),
    ("tile_rows", "256", "power of two from 1"), ("tile_columns", "0", "power of two from 16"),
    ("tile_columns", "65536", "to 16384"), ("tile_rows,tile_columns", "8,16384", "at most 65536"),
    ("warps", "64", "to 32"), ("warps", "", "int"), ("stages", "9", "stages must be from 1 to 8"),
    ("tokens", "2", "Invalid enum value 2"), ("tile_rows,tile_columns,warps,stages", "0,0,0,0", "power of two"),
    ("us", "nan", "> 0"), ("us", "inf", "finite"), ("us", "4.0", "gbs must be 3.2"), ("gbs", "9", "gbs must be 6.4"),
    ("gbs", "-1", ">= 0"), ("share", "-0.1", ">= 0"), ("timings", "0", ">= 1"), ("date", "yesterday", "date"),
    ("torch", "=1+1", "regex"), ("triton", "3.6.0,more", "17 values in 16 columns"),
])
def test_a_damaged_line_is_refused_with_its_place(folder: Path, column: str, value: str, message: str) -> None:
    """A typing mistake that compiles for minutes, runs slowly for no visible reason, or is skipped without a word."""
    good, bad = (tuning.text([e]).splitlines()[1].split(",") for e in (entry(op="swiglu"), entry()))
    for name, text in zip(column.split(","), value.split(",") if "," in column else [value], strict=True):
        bad[COLUMNS.index(name)] = text
    file = folder / f"{GPU}.csv"
    file.write_text("\n".join(",".join(line) for line in (COLUMNS, good, bad)))
    with pytest.raises(ConfigError) as caught:
        tuning.tile("swiglu", 1, 100, 64, "float16", 0)
    assert message in caught.value.fact
    assert f"{file}, line 3" in caught.value.context
    assert "hybridlab tune MODEL" in caught.value.remedy


@pytest.mark.parametrize(("content", "message"), [
    (b"", "other columns"), (b"op,rows\n", "other columns"), (b"\xff\xfe\x00", "cannot be read"),
    ((tuning.text([entry()]) + tuning.text([entry()]).splitlines()[1]).encode(), "stands in an earlier line"),
    ((tuning.text([entry()]) + "\n").encode(), "1 values in 16 columns"),
])
def test_a_damaged_file_is_refused(folder: Path, content: bytes, message: str) -> None:
    """Columns in another order, half a file, or two answers to one question."""
    (folder / f"{GPU}.csv").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        tuning.table(GPU)


# ---- search ----------------------------------------------------------------------------------------------------------

def test_products_of_a_model_from_its_config() -> None:
    """A product that the step runs and nobody tunes; queries counted as often as keys; weights made to find out."""
    layer = ["project 6,144 × 4,096", "residual 4,096 × 4,096", "swiglu 14,336 × 4,096", "residual 4,096 × 14,336"]
    assert list(map(str, tune.products("random:mistral-7b"))) == [*layer, "project 32,000 × 4,096", *(
        f"{product}, {tokens} tokens" for tokens in (16, 32, 64, 128) for product in layer)]
    assert tune.products("random:mistral-7b")[0].parts == (4096, 1024, 1024)
    assert tune.products("random:llama-2-7b")[2].parts == (11008, 11008)


def test_the_steps_own_products_are_those(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries under keys that the running kernels never ask for."""
    import hybridlab as hl

    model, asked = models.load("random:tiny-qwen3-8b", device="cpu"), set[tuple]()
    kernel = torch.ops.hybridlab_jit

    def noting(name: str, at: slice) -> Any:
        def call(*args: Any) -> None:
            parts = [weight for weight in args[at] if weight is not None]
            rows = sum(len(weight) for weight in parts) // (2 if name == "swiglu" else 1)  # of each of two
            asked.add((name, args[0].numel() // args[0].shape[-1], rows, parts[0].shape[1]))
            getattr(kernel, name).default(*args)
        return SimpleNamespace(default=call)

    with hl.Runtime(model, arm="jit", kernels="fused", capture="sync", max_len=32, buckets=[16]) as runtime:
        runtime.generate([3, 4], max_new_tokens=2, stop=[])
        for key in (("decode", 1), ("prefill", 16)):
            program = runtime._executor.programs["hybridlab_jit", *key]
            monkeypatch.setattr(program, "ops", SimpleNamespace(
                project=noting("project", slice(3, 6)), swiglu=noting("swiglu", slice(3, 5)),
                residual=noting("residual", slice(1, 2)), attend_next=kernel.attend_next))
            program()
    assert asked == {one.key("")[:-1] for one in tune.products(model) if one.tokens in (1, 16)}


def test_a_model_that_cannot_be_fused_is_refused() -> None:
    """Minutes of timing for kernels that this model never runs."""
    config = models.AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=1, vocab_size=16)
    with pytest.raises(ConfigError, match="cannot be fused"):
        tune.products(models.AutoModelForCausalLM.from_config(config))


def clock(launches: Sequence[Any]) -> list[float]:
    """The median decides: one replay of the slow tile is the quickest of all."""
    return [5.0, 2.0, 2.0] if launches[0].keywords["tile"] == FAST else [1.0, 3.0, 3.0]


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("product", [TINY, Product("swiglu", 6, 32, (6, 6)), Product("residual", 5, 32, (5,))])
def test_the_search_takes_the_fastest_of_what_computes_the_product(product: Product, tokens: int) -> None:
    """A tile that is quick because it computes something else, and one that does not compile, end the search or win."""
    ticks: list[str] = []
    broken = Tile(3, 16, 1)  # no power of two
    weights = Weights(product._replace(tokens=tokens), torch.float16, DEVICE, 2, pdl=False)
    found = tiles.search(weights, clock, [SLOW, broken, FAST], ticks.append)
    assert found.best == FAST
    assert found.us(SLOW) == 3.0
    assert list(found.left_out) == [broken]
    assert ticks == ["compiling"] * 3 + ["timing"] * 3
    weights.exact = weights.exact + 1
    with pytest.raises(MeasureError, match=r"none of 1 tiles ran .*wrong result"):
        tiles.search(weights, clock, [FAST])


def test_a_tile_that_fails_only_in_a_graph_is_left_out() -> None:
    """One failure of 22 ends a search of minutes."""
    def fails(launches: Sequence[Any]) -> list[float]:
        if launches[0].keywords["tile"] == SLOW:
            raise RuntimeError("operation not permitted\nmore")
        return [1.0]

    found = tiles.search(Weights(TINY, torch.float32, DEVICE, 1, pdl=False), fails, [SLOW, FAST])
    assert found == Found({FAST: [1.0]}, {SLOW: "RuntimeError: operation not permitted"})


def test_where_the_library_is_the_fastest_it_is_kept_and_taken(folder: Path) -> None:
    """A product for which no kernel of ours is fast enough, run by one for want of a way to say so."""
    product = Product("residual", 5, 32, (5,), 64)
    found = tiles.search(Weights(product, torch.float16, DEVICE, 1, pdl=False),
                         lambda launches: [1.0 if launches[0].keywords["tile"] == LIBRARY else 2.0], [FAST, LIBRARY])
    tune.keep(GPU, [tune.entry_of(product, "float16", found, 4000.0)])
    tuning.forget()
    assert [tuning.tile("residual", tokens, 5, 32, "float16", 0) == LIBRARY for tokens in (32, 33, 64, 65, 129)] == [
        False, True, True, True, True]


def test_launches_take_every_copy_equally_often() -> None:
    """A matrix that is still in the cache when it is read again, which shows a rate that no step reaches."""
    weights = Weights(TINY, torch.float32, DEVICE, 5, pdl=False)
    first = [launch.args[3].data_ptr() for launch in weights.launches(FAST)]
    assert len(first) == 35
    assert len(set(first)) == 5
    assert first[:5] == first[5:10]
    mib = 2**20
    assert [tiles.copies_of(size, 50 * mib) for size in (32 * mib, 100 * mib, 2**31, 1)] == [7, 2, 2, tiles.MOST_COPIES]


def test_the_entry_holds_what_was_found(folder: Path) -> None:
    """A line that its own check refuses, or a rate of one of the two matrices of `swiglu`."""
    product = Product("swiglu", 11008, 4096, (11008, 11008))
    made = tune.entry_of(product, "float16", Found({FAST: [41.0, 40.8950001, 40.0]}, {}), 4356.0)
    assert (made.tile, made.us, made.gbs, made.share, made.timings) == (FAST, 40.895, 4410.2, 1.0124, 3)
    tune.keep(GPU, [made])
    assert tuning.tile("swiglu", 1, 11008, 4096, "float16", 0) == FAST


# ---- command ---------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_begins(folder: Path) -> None:
    """Tiles timed on a CPU, kept for a GPU."""
    for arguments in ((), ("--device", "cpu"), ("--device", "cuda:0"), ("--check",)):
        got = invoke("random:llama-2-7b", *arguments)
        assert (got.exit_code, got.stdout) == (2, ""), arguments
        assert "--check --gpu NAME" in got.stderr
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("arguments", [
    ("tiny", "--gpu", "a-gpu"), ("tiny", "--check", "--gpu", "A GPU"),
    ("tiny", "--check", "--gpu", GPU, "--dtype", "int8"), ("random:llama-9", "--check", "--gpu", GPU),
])
def test_bad_input_is_refused(folder: Path, arguments: tuple[str, ...]) -> None:
    """A misspelt name reported as a GPU or a dtype without tiles."""
    got = invoke(*arguments)
    assert (got.exit_code, got.stdout) == (2, "")
    assert "error" in got.stderr


def test_check_says_what_is_missing(folder: Path) -> None:
    """A model that runs with default tiles and nobody knows; a script that cannot tell."""
    wanted = tune.products("tiny")
    tune.keep(GPU, [entry(op=one.op, tokens=one.tokens, rows=one.rows, depth=one.depth) for one in wanted[1:]])
    got = invoke("tiny", "--check", "--gpu", GPU)
    assert got.exit_code == 1
    assert f"{len(wanted) - 1} of {len(wanted)} products" in got.stdout
    assert got.stdout.count("default") == 1
    tune.keep(GPU, [entry(op=wanted[0].op, rows=wanted[0].rows, depth=wanted[0].depth)])
    assert invoke("tiny", "--check", "--gpu", GPU).exit_code == 0
    got = invoke("tiny", "--check", "--gpu", "another")
    assert got.exit_code == 1
    assert "which is not there" in " ".join(got.stdout.split())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_search_on_a_gpu_covers_the_model(folder: Path) -> None:
    """A capture that fails, a candidate's memory or a result that only a GPU refuses."""
    one, several = [Tile(2, 64, 2), Tile(3, 64, 1), Tile(4, 128, 4)], [LIBRARY, Tile(64, 64, 4, 3), Tile(3, 64, 1)]
    _, words, _ = tune.run("random:tiny-llama-3", candidates=lambda tokens: one if tokens == 1 else several)
    assert "read" in words
    _, _, missing = tune.coverage("random:tiny-llama-3", gpu=GPU)
    assert missing == 0
    assert all(found.us > 0 and found.timings == tiles.TIMINGS for found in tuning.table(GPU).values())
