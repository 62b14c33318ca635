"""CUDA graphs of a backbone, with a stand-in that computes anew where a GPU replays.

What a GPU adds is tried where there is one."""

import copy
import pickle

import pytest
import torch

from block_cases import relative
from convnext_mm import ConvNeXt
from convnext_mm.models import graphs

SMALL = dict(depths=[1, 1, 1, 1], channels=[8, 8, 16, 16])


class Standin:
    """Of :class:`graphs.Capture`: a replay writes where the first run wrote."""

    captures = 0

    def aside(self, function, times):
        for _ in range(times):
            function()

    def of(self, function):
        Standin.captures += 1
        results = function()
        owner = function.__self__

        def replay():
            maps = owner._maps
            with torch.enable_grad():
                if function.__name__ == '_backward':
                    owner._maps = owner._forward()
                again = function()
            owner._maps = maps
            for result, new in zip(results, again):
                if result is not None:
                    result.data.copy_(new.detach())

        return results, replay


@pytest.fixture
def standin(monkeypatch):
    monkeypatch.setattr(graphs, 'Capture', Standin)
    monkeypatch.setattr(graphs, '_possible', lambda _, x: not x.requires_grad)
    monkeypatch.setattr(Standin, 'captures', 0)


def pair(**settings):
    """A network with graphs, and the same without."""
    torch.manual_seed(0)
    graphed = ConvNeXt(SMALL, cuda_graphs=2, layer_scale_init_value=1.0, **settings)
    plain = ConvNeXt(SMALL, layer_scale_init_value=1.0, **settings)
    plain.load_state_dict(graphed.state_dict())
    return graphed, plain


def gradients(model, x):
    model.zero_grad()
    sum((m * m.cumsum(1)).sum() for m in model(x)).backward()
    return [p.grad for p in model.parameters()]


def assert_close(maps, expected):
    for ours, theirs in zip(maps, expected):
        assert relative(ours, theirs) < 1e-5


def assert_same(model, other, x):
    for ours, expected in zip(gradients(model, x), gradients(other, x)):
        assert (ours is None) == (expected is None)
        if ours is not None:
            assert relative(ours, expected) < 1e-5


def test_a_graph_for_each_size_and_mode(standin):
    model, plain = pair()
    first, second = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 48, 32)
    for x in (first, second, first + 1, second):
        assert_same(model, plain, x)
    assert Standin.captures == 4  # two sizes, two directions
    with torch.no_grad():
        for x in (first, first + 1):
            assert_close(model(x), plain(x))
    assert Standin.captures == 5
    assert len(model.graphs._kept) == 2


def test_maps_and_gradients_are_the_callers(standin):
    """The next pass does not write over them."""
    model, plain = pair()
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        maps, before = model(x), plain(x)
        model(x + 1)
    assert_close(maps, before)
    for network in (model, plain):  # accumulated gradients
        network.zero_grad()
        for shift in (0, 1):
            sum((m * m.cumsum(1)).sum() for m in network(x + shift)).backward()
    for ours, expected in zip(model.parameters(), plain.parameters()):
        assert relative(ours.grad, expected.grad) < 1e-5


def test_two_passes_before_a_backward(standin):
    """As a network has that sees two images: the second runs without a graph."""
    model, plain = pair()
    x = torch.rand(1, 3, 32, 32)
    for network in (model, plain):
        network.zero_grad()
        a, b = network(x)[-1], network(x + 1)[-1]
        (a * b).sum().backward()
    for ours, expected in zip(model.parameters(), plain.parameters()):
        if expected.grad is not None:
            torch.testing.assert_close(ours.grad, expected.grad)
    (graph,) = model.graphs._kept.values()
    assert not graph.waits_for_backward()
    model(x)  # what is dropped without a backward pass keeps nothing waiting
    assert not graph.waits_for_backward()
    assert_same(model, plain, x)


def test_a_second_backward_is_refused(standin):
    model, _ = pair()
    x = torch.rand(1, 3, 32, 32)
    loss = model(x)[-1].cumsum(1).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='cuda_graphs=0'):
        loss.backward(retain_graph=True)
    model(x)[-1].cumsum(1).sum().backward()  # uses the graph up again
    with pytest.raises(RuntimeError, match='cuda_graphs=0'):
        loss.backward()


def test_gradients_are_the_parameters_own(standin):
    """Hooks of parameters run once, and one in the place of another gets its own."""
    model, plain = pair()
    x = torch.rand(1, 3, 32, 32)
    for network in (model, plain):
        network.stages[0][0].norm.weight.register_hook(lambda grad: 3 * grad)
    assert_same(model, plain, x)
    for network in (model, plain):
        network.stages[1][0].norm.weight = torch.nn.Parameter(
            network.stages[1][0].norm.weight.data
        )
    assert_same(model, plain, x)
    assert all(isinstance(p, torch.nn.Parameter) for p in model.parameters())
    assert model.stages[1][0].norm.weight.grad is not None


def test_other_weights_of_a_deployed_network(standin):
    model, plain = pair()
    x = torch.rand(1, 3, 32, 32)
    model.switch_to_deploy(), plain.switch_to_deploy()
    with torch.no_grad():
        for factor in (1.0, 1.5):
            for network in (model, plain):
                for parameter in network.parameters():
                    parameter.mul_(factor)
            assert_close(model(x), plain(x))


def test_changing_sizes_end_captures(standin, monkeypatch):
    said = []
    monkeypatch.setattr(graphs, 'print_log', lambda text, *_: said.append(text))
    model, plain = pair()
    for size in range(32, 32 + 20):
        x = torch.rand(1, 3, size, 32)
        with torch.no_grad():
            assert_close(model(x), plain(x))
    assert Standin.captures == 2 * graphs.PATIENCE
    (text,) = said
    assert 'goes on without new ones' in text
    assert len(model.graphs._kept) == 2


def test_state_is_part_of_what_is_kept(standin):
    """Parameters that moved or froze, modes, autocast, deployment."""
    model, plain = pair(drop_path_rate=0.2, frozen_stages=1)
    x = torch.rand(1, 3, 32, 32)
    model.eval(), plain.eval()
    assert_same(model, plain, x)
    for network in (model, plain):
        network.load_state_dict(
            {k: v.clone() * 1.5 for k, v in network.state_dict().items()}, assign=True
        )
        network._freeze()
    assert_same(model, plain, x)
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad():
        assert_close(model(x), plain(x))
    model.switch_to_deploy(), plain.switch_to_deploy()
    assert not model.graphs._kept
    with torch.no_grad():
        assert_close(model(x), plain(x))


def test_copies_and_files_hold_no_graph(standin):
    model, _ = pair()
    with torch.no_grad():
        model(torch.rand(1, 3, 32, 32))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.graphs.limit == 2 and not copied.graphs._kept


def test_what_cannot_be_captured_says_so(standin, monkeypatch):
    def refuse(self, function):
        raise RuntimeError('operation not permitted when stream is capturing')

    monkeypatch.setattr(Standin, 'of', refuse)
    model, _ = pair()
    with pytest.raises(RuntimeError, match='CUDA graph.*32, 32.*cuda_graphs=0'):
        model(torch.rand(1, 3, 32, 32))


def test_without_a_gpu_nothing_is_captured(monkeypatch):
    said = []
    monkeypatch.setattr(graphs, 'print_log', lambda text, *_: said.append(text))
    model, plain = pair()
    for _ in range(2):
        assert_same(model, plain, torch.rand(1, 3, 32, 32))
    assert not model.graphs._kept
    (text,) = said
    assert 'cuda_graphs=2 of the ConvNeXt does nothing on cpu' in text
    with pytest.raises(ValueError, match='cuda_graphs.*-1'):
        ConvNeXt(SMALL, cuda_graphs=-1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs an NVIDIA GPU')
@pytest.mark.parametrize('autocast', [False, True])
def test_on_a_gpu(autocast):
    model, plain = (m.cuda() for m in pair())
    for shift in (0, 1, 2):
        x = torch.rand(2, 3, 64, 64, device='cuda') + shift
        with torch.autocast('cuda', torch.bfloat16, enabled=autocast):
            found, expected = (gradients(m, x) for m in (model, plain))
        for ours, theirs in zip(found, expected):
            torch.testing.assert_close(ours, theirs, rtol=0.05, atol=1e-2)
    assert len(model.graphs._kept) == 1
