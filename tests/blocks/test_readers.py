import ast
import importlib
from pathlib import Path

import pytest
import timm
from timm.layers import GroupNormAct
from timm.models import fastvit
from timm.models.byobnet import LayerFn, MobileOneBlock, RepVggBlock
from torch import nn

from repopt_timm import Scales, hyper_search, plain_twin, report_twin
from repopt_timm.blocks.readers import KEPT, READERS
from repopt_timm.reparam import FOLDING_CLASSES, repvgg_prior

from .block_examples import examples


@pytest.mark.parametrize('example', examples().values(), ids=examples())
def test_a_block_becomes_convolutions_with_the_branches_that_it_had(example):
    twin = plain_twin(example.block)
    prior = {name: dict(each.branches) for name, each in repvgg_prior(twin).items()}
    assert prior == example.branches
    assert {name: each for row in report_twin(example.block) for name, each in row.branches.items()} == prior


GHOSTS = [f'blocks.{stage}.{index}' for stage, index in [(1, 0), (2, 0), (6, 0), (6, 2), (6, 3), (8, 3)]]


@pytest.mark.parametrize(
    ('name', 'convs', 'squares'),
    [
        ('repvgg_a0', [f'stages.2.{index}.conv' for index in (0, 1, 2, 8)], [1, 2, 1, 1 / 4]),
        ('mobileone_s0', [f'stages.0.{index}.conv' for index in range(4)], [1, 2 / 3, 1 / 2, 2 / 5]),
        (
            'repghostnet_050',
            [f'{block}.ghost{number}.cheap_operation.conv' for block in GHOSTS for number in (1, 2)],
            [2 / (position + 1) for position in (1, 2, 3, 4, 3, 4, 7, 8, 1, 2, 9, 10)],
        ),
    ],
)
def test_scales_start_by_stage_by_run_or_as_published_for_repghostnet(name, convs, squares):
    scales = Scales.initial(plain_twin(timm.create_model(name, device='meta')))
    assert [scales[conv]['kxk'][0].item() ** 2 for conv in convs] == pytest.approx(squares)


class Odd(RepVggBlock):
    pass


@pytest.mark.parametrize(
    ('block', 'reason'),
    [
        (RepVggBlock(4, 4, drop_path_rate=0.1), 'drop_path_rate=0'),
        (RepVggBlock(4, 4, drop_block=nn.Dropout), 'BatchNormAct2d .* drops'),
        (MobileOneBlock(32, 32, layers=LayerFn(norm_act=GroupNormAct)), 'GroupNormAct'),
        (MobileOneBlock(4, 4, layers=LayerFn(conv_norm_act=lambda *args, **kwargs: nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.AvgPool2d(1)))), 'Sequential'),
        (Odd(4, 4), 'does not know this class'),
    ],
)  # fmt: skip
def test_a_block_that_cannot_become_plain_is_named_with_the_reason(block, reason):
    with pytest.raises(ValueError, match=rf"'0' of Sequential is a {type(block).__name__} .*{reason}"):
        plain_twin(nn.Sequential(block))


@pytest.mark.parametrize('block', [fastvit.RepMixer(4), fastvit.RepConditionalPosEnc(4)])
def test_a_residual_connection_keeps_its_branches_and_is_listed(block):
    model = nn.Sequential(block, MobileOneBlock(4, 4))
    twin = plain_twin(model)
    assert type(twin[0]) is type(block)
    assert [row.type for row in report_twin(model) if row.reason] == [type(block).__name__]
    assert list(Scales.from_model(hyper_search(twin))) == ['1.conv']


def test_every_block_of_timm_with_a_fusing_method_is_known():
    """A class that a new timm brings is an error until somebody has looked at it."""
    found = set()
    for file in Path(importlib.import_module('timm.models').__file__).parent.glob('*.py'):
        source = file.read_text()
        for node in ast.parse(source).body if 'def fuse' in source or 'def reparameterize' in source else ():
            methods = {each.name for each in getattr(node, 'body', ()) if isinstance(each, ast.FunctionDef)}
            if isinstance(node, ast.ClassDef) and methods & {'fuse', 'reparameterize'}:
                found.add(f'timm.models.{file.stem}.{node.name}')
    assert 'timm.models.byobnet.RepVggBlock' in found
    unknown = found - set(READERS) - set(KEPT)
    assert {name.rpartition('.')[2] for name in unknown} <= FOLDING_CLASSES
