"""Traces as a table and in words: medians over the decode tokens of each arm. Never imports torch."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from hybridlab.report import NONE, Grid, number

COLUMNS = {  # of the table: the column of `gaps.by_token`, and how many of its unit are one
    "host, ms": ("host_us", 1e3), "Python, ms": ("python_us", 1e3), "launching, ms": ("launch_us", 1e3),
    "waiting, ms": ("sync_us", 1e3), "operations, ms": ("ops_us", 1e3), "launches": ("launches", 1),
    "of graphs": ("graph_launches", 1), "kernels": ("kernels", 1), "device, ms": ("device_us", 1e3),
    "busy, ms": ("busy_us", 1e3), "gaps, ms": ("idle_us", 1e3), "overlap, ms": ("overlap_us", 1e3)}


def grid(tokens: Mapping[str, pd.DataFrame], caption: str) -> Grid:
    """A row an arm: medians over its decode tokens of what `gaps.by_token` says of each; no column of zeros alone, as
    all are of the device where there is none."""
    decode = {name: table[table["category"] == "decode"] for name, table in tokens.items()}
    shown = {title: of for title, of in COLUMNS.items() if any(table[of[0]].any() for table in decode.values())}
    rows = []
    for name, table in decode.items():
        cells = [name, str(len(table))]
        for column, unit in shown.values():
            value = float(table[column].astype(float).median()) / unit if len(table) else None
            cells.append(NONE if value is None else f"{value:,.0f}" if unit == 1 else number(value))
        rows.append(cells)
    return Grid(f"Where a decode token's time goes · {caption}", ["arm", "tokens", *shown], rows,
                "Medians under a profiler, which slows launches: they explain latencies and are none. Python: on the "
                "host, in no launch call, or in no operation where there is no device; gaps: the device idle between a "
                "token's first and last work.")


def reading(tokens: Mapping[str, pd.DataFrame]) -> str:
    """In words what the tables of tokens say, the arm with most launches first."""
    said = []
    for name, table in tokens.items():
        decode = table[table["category"] == "decode"]
        if decode.empty:
            continue
        middle = decode.select_dtypes("number").astype(float).median()
        if middle["kernels"] > 0:
            said.append(f"{name}: {middle['launches']:,.0f} launches start {middle['kernels']:,.0f} kernels; of "
                        f"{middle['device_us'] / 1e3:.2f} ms on the device busy for {middle['busy_us'] / 1e3:.2f} "
                        f"ms, idle for {middle['idle_us'] / 1e3:.2f} ms; launch calls take "
                        f"{middle['launch_us'] / 1e3:.2f} ms of the host, Python {middle['python_us'] / 1e3:.2f} ms.")
        else:
            said.append(f"{name}: of {middle['host_us'] / 1e3:.2f} ms, operations take {middle['ops_us'] / 1e3:.2f} ms "
                        f"and Python between them {middle['python_us'] / 1e3:.2f} ms.")
    return "\n".join(said)
