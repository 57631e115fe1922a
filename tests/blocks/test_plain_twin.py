import ast
import copy
import importlib
from pathlib import Path

import pytest
import timm
import torch
from repopt_timm.reparam.convolutions import FOLDING_CLASSES
from timm.layers import GroupNormAct
from timm.models import fastvit
from timm.models.byobnet import LayerFn, MobileOneBlock, RepVggBlock
from timm.utils import reparameterize_model
from torch import nn

from repopt_timm import Scales, csla, hyper_search, plain_state_dict, plain_twin, prepare, report_twin
from repopt_timm.blocks import PlainBlock
from repopt_timm.blocks.plain_twin import KEPT, READERS
from repopt_timm.reparam import repvgg_prior

from .block_examples import examples, images

EXAMPLES = examples()


@pytest.fixture(params=EXAMPLES)
def example(request):
    return EXAMPLES[request.param]


def test_a_block_becomes_one_convolution_with_the_branches_that_it_had(example):
    twin = plain_twin(example.block)
    prior = {name: dict(each.branches) for name, each in repvgg_prior(twin).items()}
    assert prior == example.branches
    assert {name: each for row in report_twin(example.block) for name, each in row.branches.items()} == prior


def test_a_merged_block_computes_what_its_branches_did(example):
    x = images(example.channels)
    before = copy.deepcopy(example.block.state_dict())
    block = copy.deepcopy(example.block).eval()
    twin = plain_twin(block, weights=True)
    torch.testing.assert_close(twin(x), block(x), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(plain_twin(block)(x), block(x))
    torch.testing.assert_close(example.block.state_dict(), before)


def test_a_folded_twin_has_no_batchnorm_in_the_place_of_a_block(example):
    x = images(example.channels)
    twin = plain_twin(copy.deepcopy(example.block).eval(), weights=True)
    for model in (twin, hyper_search(twin), csla(twin, Scales.initial(twin))):
        folded = reparameterize_model(nn.Sequential(model))
        blocks = [module for module in folded.modules() if isinstance(module, PlainBlock)]
        assert len(blocks) == len(example.branches)
        assert not any(isinstance(module, nn.BatchNorm2d) for block in blocks for module in block.modules())
        torch.testing.assert_close(folded(x), model(x))


def test_the_running_mean_of_a_merged_block_is_the_mean_of_its_convolution(example):
    x = images(example.channels)
    block = copy.deepcopy(example.block).train()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    block(x)
    twin = plain_twin(block, weights=True)
    first: PlainBlock = next(module for module in twin.modules() if isinstance(module, PlainBlock))
    first.conv.register_forward_hook(lambda conv, inputs, output: means.append(output.mean((0, 2, 3))))
    means: list[torch.Tensor] = []
    twin.eval()(x)
    # A BatchNorm in front of it normalizes with a variance that is 256/255 of the running one.
    torch.testing.assert_close(first.bn.running_mean, means[0], rtol=0.02, atol=0.01)


def test_the_state_dict_of_a_multi_branch_network_becomes_that_of_its_twin():
    trained = EXAMPLES['mobileone-depthwise'].block
    fresh = MobileOneBlock(8, 8, group_size=1, num_conv_branches=3).double()
    plain = plain_state_dict(fresh, trained.state_dict())
    torch.testing.assert_close(plain, plain_twin(trained, weights=True).state_dict())
    assert sorted(plain) == sorted(plain_twin(fresh).state_dict())


def test_a_twin_keeps_the_names_of_a_rep_opt_vgg():
    twin = plain_twin(timm.create_model('repvgg_a0', device='meta'))
    assert set(twin.state_dict()) == set(timm.create_model('repopt_vgg_a0', device='meta').state_dict())


def test_scales_of_repvgg_start_by_stage_and_those_of_others_by_run():
    repvgg = Scales.initial(plain_twin(timm.create_model('repvgg_a0', device='meta')))
    mobileone = Scales.initial(plain_twin(timm.create_model('mobileone_s0', device='meta')))
    starts = [round(repvgg[f'stages.2.{index}.conv']['kxk'][0].item(), 4) for index in (0, 1, 2, 8)]
    assert starts == [1.0, 1.4142, 1.0, 0.5]
    starts = [round(mobileone[f'stages.0.{index}.conv']['kxk'][0].item(), 4) for index in range(4)]
    assert starts == [1.0, 0.8165, 0.7071, 0.6325]
    assert mobileone.counts['stages.0.0.conv'] == {'1x1': 1, 'kxk': 4}


def test_scales_of_repghostnet_start_as_published_by_two_modules_a_bottleneck():
    scales = Scales.initial(plain_twin(timm.create_model('repghostnet_050', device='meta')))
    blocks = [f'blocks.{stage}.{index}' for stage, index in [(1, 0), (2, 0), (6, 0), (6, 2), (6, 3), (8, 3)]]
    modules = [f'{block}.ghost{number}.cheap_operation.conv' for block in blocks for number in (1, 2)]
    positions = [1, 2, 3, 4, 3, 4, 7, 8, 1, 2, 9, 10]
    starts = [scales[module]['kxk'][0].item() for module in modules]
    assert starts == pytest.approx([(2 / (n + 1)) ** 0.5 for n in positions])


def test_a_twin_of_a_twin_is_an_error():
    twin = plain_twin(RepVggBlock(4, 4))
    prepare(twin, Scales.initial(twin))
    with pytest.raises(ValueError, match='PlainBlock has no multi-branch block'):
        plain_twin(twin)


@pytest.mark.parametrize(
    ('block', 'message'),
    [
        (RepVggBlock(4, 4, drop_path_rate=0.1), r'it drops branches at a rate of 0\.1; .* drop_path_rate=0\.'),
        (MobileOneBlock(4, 4, drop_path_rate=0.1), r'it drops branches at a rate of 0\.1; .* drop_path_rate=0\.'),
        (RepVggBlock(4, 4, drop_block=nn.Dropout), r'BatchNormAct2d of a branch drops or activates'),
        (MobileOneBlock(32, 32, layers=LayerFn(norm_act=GroupNormAct)), 'GroupNormAct of a branch is not a BatchNorm'),
    ],
    ids=['drop-path', 'drop-path-mobileone', 'drop-block', 'norm'],
)
def test_a_block_that_cannot_become_plain_is_named_with_the_reason(block, message):
    with pytest.raises(ValueError, match=rf"'0' of Sequential is a \w+ that cannot become plain: {message}"):
        plain_twin(nn.Sequential(block))


@pytest.mark.parametrize('name', ['ghostnetv3', 'lcnetv2', 'mobileone-depthwise'])
def test_a_twin_can_be_scripted(name):
    if name not in EXAMPLES:
        pytest.skip(f'timm {timm.__version__} does not have {name}')
    x = images(EXAMPLES[name].channels)
    twin = plain_twin(EXAMPLES[name].block, weights=True).eval()
    torch.testing.assert_close(torch.jit.script(copy.deepcopy(twin))(x), twin(x))


def test_hooks_of_a_block_are_those_of_what_takes_its_place():
    model = nn.Sequential(MobileOneBlock(4, 4))
    calls = []
    model[0].register_forward_hook(lambda module, inputs, output: calls.append(type(module)))
    plain_twin(model)(torch.randn(2, 4, 4, 4))
    assert calls == [PlainBlock]


def test_a_block_of_an_unknown_class_is_an_error():
    class Odd(RepVggBlock):
        pass

    with pytest.raises(ValueError, match=r"'0' of Sequential is a Odd that cannot .* does not know this class\."):
        plain_twin(nn.Sequential(Odd(4, 4)))


@pytest.mark.parametrize(
    ('block', 'kept'),
    [(fastvit.RepMixer(4), 'RepMixer'), (fastvit.RepConditionalPosEnc(4), 'RepConditionalPosEnc')],
    ids=['mixer', 'position'],
)
def test_a_residual_connection_keeps_its_branches_and_is_listed(block, kept):
    model = nn.Sequential(block, MobileOneBlock(4, 4)).eval()
    twin = plain_twin(model, weights=True)
    assert type(twin[0]) is type(block)
    rows = report_twin(model)
    assert [row.type for row in rows] == [kept, 'MobileOneBlock']
    assert 'a residual connection' in rows[0].reason
    assert list(Scales.from_model(hyper_search(twin))) == ['1.conv']


def test_every_block_of_timm_with_a_fusing_method_is_known():
    """A class that a new timm brings is an error until somebody has looked at it."""
    models = Path(importlib.import_module('timm.models').__file__).parent
    found = set()
    for file in models.glob('*.py'):
        source = file.read_text()
        for node in ast.parse(source).body if 'def fuse' in source or 'def reparameterize' in source else ():
            methods = {each.name for each in getattr(node, 'body', ()) if isinstance(each, ast.FunctionDef)}
            if isinstance(node, ast.ClassDef) and methods & {'fuse', 'reparameterize'}:
                found.add(f'timm.models.{file.stem}.{node.name}')
    unknown = found - set(READERS) - set(KEPT)
    assert {name.rpartition('.')[2] for name in unknown} <= FOLDING_CLASSES
