"""What a run compares, each with its name, and settings of which one needs another."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, NamedTuple

from hybridlab.config import (
    COMPILING,
    POLICIES,
    REPLAYING,
    Arm,
    Kernels,
    Policy,
    RunConfig,
    RuntimeConfig,
    TraceConfig,
    policy,
    policy_name,
)
from hybridlab.errors import ConfigError

if TYPE_CHECKING:
    from hybridlab.engines import PeersConfig


class Cell(NamedTuple):
    """What one column of a run's tables was measured with."""

    arm: Arm
    policy: Policy
    kernels: Kernels
    steps: int


def cells(config: RunConfig | TraceConfig | PeersConfig) -> dict[str, Cell]:
    """What a run compares, by the name it has in rows: each arm, a replaying one under each policy, one that compiles
    with each choice of kernels that its policy allows, and one that replays whole steps with each number of them.

    The name is the arm's, followed by the policy's where the run compares several, by "fused" where only some are, and
    by the number of steps where some launch several.
    """
    policies = [policy(p) for p in (config.policy if isinstance(config.policy, tuple) else (config.policy,))]
    choices = config.kernels if isinstance(config.kernels, tuple) else (config.kernels,)
    steps = getattr(config, "steps", 1)  # a trace and peers have one
    counts = steps if isinstance(steps, tuple) else (steps,)
    found: dict[str, Cell] = {}
    for arm in config.arms:
        for p in policies if arm in REPLAYING else policies[:1]:
            several = arm in REPLAYING and p == POLICIES["full"]
            whole = [k for k in choices if k != "fused" or len(choices) == 1 or arm not in REPLAYING or not p.between]
            for kernels, count in product(whole if arm in COMPILING else ("auto",), counts if several else (1,)):
                words = [arm, policy_name(p) if len(policies) > 1 and arm in REPLAYING else "",
                         kernels if len(choices) > 1 and kernels == "fused" else "",
                         f"{count} steps" if len(counts) > 1 and count > 1 else ""]
                found[" ".join(filter(None, words))] = Cell(arm, p, kernels, count)
    return found


def require_possible(config: RuntimeConfig) -> None:
    """Raise `ConfigError` for settings of which one needs another."""
    if config.kernels == "fused" and config.arm not in COMPILING:
        raise ConfigError("kernels is 'fused'", f"arm {config.arm} compiles no kernels",
                          f"use arm {' or '.join(map(repr, COMPILING))}, or kernels='torch'")
    chosen = policy(config.policy)
    if config.kernels == "fused" and config.arm in REPLAYING and chosen.between:
        raise ConfigError("kernels is 'fused'", f"policy {policy_name(chosen)} keeps operations out of graphs that "
                          "would be fused with others", "use kernels='torch', or policy 'whole' or 'full'")
    if config.steps > 1 and (config.arm not in REPLAYING or policy(config.policy) != POLICIES["full"]):
        raise ConfigError(f"steps is {config.steps}", "only a graph that also prepares and draws can hold several",
                          f"use policy='full' and arm {' or '.join(map(repr, REPLAYING))}, or steps=1")
    if config.steps == 1 and config.repeat != "auto":
        raise ConfigError(f"repeat is {config.repeat!r}", "there is nothing to repeat", "give steps as well")


def require_distinct(config: RunConfig) -> None:
    """Raise `ConfigError` for a value that `config` compares with itself, and for more processes than rounds."""
    for name in ("arms", "lengths", "policy", "kernels", "steps"):
        values = getattr(config, name)
        if isinstance(values, tuple) and len(set(values)) != len(values):
            raise ConfigError(f"{name} holds a value twice", f"{list(values)}", "each is measured once a round")
    if config.restarts > config.repeats:
        raise ConfigError(f"restarts is {config.restarts}", f"{config.repeats} rounds are shared by them",
                          "give at least as many repeats")


def require_steps(config: RunConfig, on_cpu: bool) -> None:
    """Raise `ConfigError` if `config` times several steps a launch where no cell makes them, or where their tokens are
    there only when the launch has ended: on a CPU most of the gaps between them would be nothing."""
    if config.steps != 1 and all(cell.steps == 1 for cell in cells(config).values()):
        raise ConfigError(f"steps is {config.steps}", "nothing here replays whole steps, so none launches several",
                          f"use policy='full' and arm {' or '.join(map(repr, REPLAYING))}, or steps=1")
    if on_cpu and any(cell.steps > 1 for cell in cells(config).values()):
        raise ConfigError(f"steps is {config.steps}", "on a CPU the tokens of one launch arrive together, so that gaps "
                          "between them say nothing", "time this on a GPU, or use steps=1")
