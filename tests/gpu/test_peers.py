"""Other systems on a GPU: compiled steps are really replayed as graphs, and give the tokens of ours."""

import pytest
import torch

from hybridlab import hfpeers, measure, outlines, peers
from hybridlab.engines import PeersConfig

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")]


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    config = PeersConfig(device="cuda", dtype="float32", lengths=(5, 40), new_tokens=16)
    prompts = measure.prompts(outlines.outline("tiny"), config.lengths, 0)
    return peers.Asked(config, {"arm": "hybrid", "kernels": "torch"}, [*prompts.values()], 64,
                       tmp_path_factory.mktemp("peer"), False)


@pytest.mark.parametrize("kind", [hfpeers.Generate, hfpeers.Compile, hfpeers.CompilePrefill])
def test_tokens_are_ours_and_compiled_steps_are_graphs(asked, kind):
    """A static cache at addresses that may move makes Inductor leave out graphs, and the peer slower than it is."""
    ours, other = peers.Ours(asked), kind(asked)
    try:
        for each in (ours, other):
            each.warm_up(asked.prompts, 16)
        compiled = other.counters.compiles
        for prompt in asked.prompts:
            assert other.generate(prompt, 16).ids == ours.generate(prompt, 16).ids
        assert other.counters.compiles == compiled
        path = "eager" if kind is hfpeers.Generate else "graph"
        assert other.paths == ("graph" if kind is hfpeers.CompilePrefill else "eager", path), other.reason
    finally:
        ours.close()
    torch.cuda.synchronize()
