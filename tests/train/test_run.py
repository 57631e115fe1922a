import csv
import shutil
import subprocess
import sys
import tarfile
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from timm.models import resume_checkpoint

from repopt_timm import Scales, save_pretrained
from repopt_timm.checkpoint_model import model_from_checkpoint
from repopt_timm.scales import read_scale_file
from repopt_timm.train import run
from repopt_timm.train.command import main

from ..helpers import TINY, tiny_model
from .runs import ENVIRONMENT, assert_same_bits, read


class BrokenOffError(Exception):
    pass


def interrupt_after(monkeypatch, epochs):
    """Lets a run break off in the middle of an epoch."""

    def train_one_epoch(state, loaders, loss_fn, clip, autocast, epoch, args):
        if epoch == epochs:
            next(iter(loaders.train))
            raise BrokenOffError
        return original(state, loaders, loss_fn, clip, autocast, epoch, args)

    original = run.train_one_epoch
    monkeypatch.setattr(run, 'train_one_epoch', train_one_epoch)


@pytest.mark.parametrize('workers', ['0', '2'])
@pytest.mark.parametrize(
    ('model', 'extra'),
    [
        (TINY, ['--scales', 'initial', '--model-ema', '--reprob', '0.5', '--drop', '0.3', '--clip-grad', '1']),
        (TINY, ['--scales', 'initial', '--opt', 'lookahead_repopt_adamw', '--mixup', '0.5', '--sched', 'plateau']),
        (f'{TINY}_hs', ['--sched-on-updates', '--grad-accum-steps', '4', '--aa', 'rand-m9', '--no-prefetcher']),
    ],
    ids=['target', 'lookahead', 'search'],
)
def test_a_resumed_run_ends_with_the_same_bits(arguments, tmp_path, monkeypatch, workers, model, extra):
    extra = [*extra, '--workers', workers]
    main(arguments(*extra, model=model, experiment='whole'))
    with monkeypatch.context() as patch, pytest.raises(BrokenOffError):
        interrupt_after(patch, 2)
        main(arguments(*extra, model=model, experiment='cut'))
    main(arguments(*extra, '--resume', model=model, experiment='cut'))
    whole, cut = read(tmp_path / 'whole'), read(tmp_path / 'cut')
    assert_same_bits(whole['state_dict'], cut['state_dict'])
    if 'state_dict_ema' in whole:
        assert_same_bits(whole['state_dict_ema'], cut['state_dict_ema'])
    assert whole['history'] == cut['history']
    assert (tmp_path / 'whole/summary.csv').read_text() == (tmp_path / 'cut/summary.csv').read_text()


@pytest.mark.slow
def test_processes_that_find_different_checkpoints_do_not_go_on(arguments, tmp_path):
    main(arguments('--scales', 'initial', '--epochs', '1'))
    (tmp_path / 'train.py').write_text(
        'import os, sys\nfrom repopt_timm.cli import main\n'
        "sys.exit(main(['train', *sys.argv[1:], *(['--experiment', 'other'] if os.environ['RANK'] == '1' else [])]))"
    )
    launch = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    command = [sys.executable, *launch, str(tmp_path / 'train.py'), *arguments('--scales', 'initial', '--resume')]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert done.returncode
    assert 'The processes would go on after different epochs: 1, 0, by rank.' in done.stderr


def test_a_search_leaves_its_scales_with_their_provenance(arguments, tmp_path):
    main(arguments('--model-kwargs', 'strides=(2,1,2,2,2)', model=f'{TINY}_hs'))
    scales = read_scale_file(tmp_path / 'run/scales.safetensors')
    assert scales == read_scale_file(tmp_path / 'run/last.pth.tar')
    assert scales != Scales.initial(tiny_model(strides=(2, 1, 2, 2, 2)))
    assert scales.provenance['epochs'] == 3
    assert scales.provenance['seed'] == 1
    assert (tmp_path / 'run/scales.png').stat().st_size > 1000


def test_the_names_of_the_classes_go_into_the_checkpoint_and_from_there_into_a_repository(arguments, tmp_path):
    main(arguments('--scales', 'initial', '--epochs', '1'))
    assert read(tmp_path / 'run')['label_names'] == ['dark', 'light']
    save_pretrained(tmp_path / 'run/last.pth.tar', tmp_path / 'saved', scales=Scales.initial(tiny_model()))
    loaded = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True)
    assert list(loaded.pretrained_cfg['label_names']) == ['dark', 'light']


def test_a_target_is_trained_with_the_scales_it_is_given(arguments, tmp_path):
    Scales.initial(tiny_model()).save(tmp_path / 'searched.safetensors')
    main(arguments('--scales', str(tmp_path / 'searched.safetensors')))
    checkpoint = read(tmp_path / 'run')
    assert checkpoint['args'].opt == 'repopt_sgd'
    fingerprints = {group['scales_fingerprint'] for group in checkpoint['optimizer']['param_groups']}
    assert fingerprints == {Scales.initial(tiny_model()).fingerprint}
    rows = list(csv.DictReader((tmp_path / 'run/summary.csv').open()))
    assert [row['epoch'] for row in rows] == ['1', '2', '3']
    assert float(rows[-1]['eval_top1']) >= 50


def test_the_numbers_of_a_network_are_those_of_the_run_of_its_checkpoint_and_of_what_is_resumed(arguments, tmp_path):
    numbers = ['--model-kwargs', 'depths=(1,1)', 'widths=(8,8,16)', 'strides=(1,2,2)', '--warmup-epochs', '0']
    for epochs in ('1', '2'):
        main(arguments(*numbers, '--epochs', epochs, '--resume', model=f'{TINY}_branches'))
    assert read(tmp_path / 'run')['args'].opt == 'sgd'
    model = model_from_checkpoint(tmp_path / 'run/last.pth.tar')
    assert (model.depths, model.widths, model.strides) == ((1, 1), (8, 8, 16), (1, 2, 2))


def test_csla_validation_and_ordinary_models_train_too(arguments, tmp_path):
    main(arguments('--scales', 'initial', '--epochs', '1', model=f'{TINY}_csla', experiment='csla'))
    main(arguments('--epochs', '1', model='test_byobnet', experiment='other'))
    assert (tmp_path / 'csla/last.pth.tar').exists()
    assert read(tmp_path / 'other')['args'].opt == 'sgd'


@pytest.mark.parametrize(('mode', 'classifier'), [('agc', 100.0), ('value', 0.01)])
def test_adaptive_clipping_leaves_the_classifier_out(mode, classifier):
    model = timm.create_model('test_byobnet', num_classes=5)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    run._make_clip(Namespace(clip_grad=0.01, clip_mode=mode), model, torch.optim.SGD(model.parameters()))()
    assert model.get_classifier().weight.grad.max() == pytest.approx(classifier)
    assert all(conv.weight.grad.max() < 1 for conv in model.modules() if isinstance(conv, torch.nn.Conv2d))


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_lower_precision_trains(arguments, tmp_path, dtype):
    main(arguments('--scales', 'initial', '--amp', '--amp-dtype', dtype, '--epochs', '1', '--channels-last'))
    assert read(tmp_path / 'run')['state_dict']['head.fc.weight'].dtype == torch.float32


def test_a_compiled_run_resumes_like_any_other(arguments, tmp_path):
    extra = [
        '--scales',
        'initial',
        '--torchcompile',
        'aot_eager',
        '--momentum',
        '0.8',
        '--opt-kwargs',
        'nesterov=False',
    ]
    main(arguments(*extra, '--epochs', '1'))
    main(arguments(*extra, '--epochs', '2', '--resume'))
    checkpoint = read(tmp_path / 'run')
    assert 'stem.conv.weight' in checkpoint['state_dict']
    assert {group['momentum'] for group in checkpoint['optimizer']['param_groups']} == {0.8}


def test_tensorboard_gets_every_epoch(arguments, tmp_path):
    main(arguments('--scales', 'initial', '--epochs', '1', '--log-tensorboard'))
    assert list((tmp_path / 'run').glob('events.out.tfevents.*'))


def test_archives_are_data_too(arguments, images, tmp_path):
    for split in ('train', 'validation'):
        with tarfile.open(tmp_path / f'{split}.tar', 'w') as archive:
            archive.add(images / split, split)
    extra = ['--train-split', 'train.tar', '--val-split', 'validation.tar', '--data-dir', str(tmp_path)]
    main([*arguments('--scales', 'initial', '--epochs', '1', *extra)[1:]])
    assert len(read(tmp_path / 'run')['state_dict']['head.fc.bias']) == 2


def test_timm_reads_the_checkpoints(arguments, tmp_path):
    main(arguments('--scales', 'initial'))
    last = tmp_path / 'run/last.pth.tar'
    model = timm.create_model(TINY, num_classes=2, scales='initial', checkpoint_path=last)
    assert_same_bits(model.state_dict(), read(tmp_path / 'run')['state_dict'])
    optimizer = timm.optim.create_optimizer_v2(model, 'repopt_sgd', lr=1.0, weight_decay=2e-5)
    assert resume_checkpoint(model, str(last), optimizer) == 3


def test_only_the_best_checkpoints_are_kept(arguments, tmp_path):
    main(arguments('--scales', 'initial', '--epochs', '5', '--checkpoint-hist', '2'))
    kept = sorted(path.name for path in (tmp_path / 'run').glob('*.pth.tar'))
    history = read(tmp_path / 'run')['history']
    best = sorted(history, key=lambda row: (-row['eval_top1'], row['epoch']))[:2]
    numbered = {f'checkpoint-{row["epoch"]}.pth.tar' for row in best}
    assert set(kept) == numbered | {'last.pth.tar', 'model_best.pth.tar'}
    assert read(tmp_path / 'run', 'model_best.pth.tar')['epoch'] == best[0]['epoch']


def test_the_whole_way_in_one_call(arguments, tmp_path, capsys):
    extra = ['--weight-decay', '5e-4']
    main(
        arguments('--search-first', *extra, '--opt-kwargs', 'grad_mults=None', '--search-kwargs', 'epochs=2', 'lr=0.01')
    )
    search = read(tmp_path / 'run/search')
    assert (len(search['history']), search['args'].weight_decay) == (2, 4e-5)
    assert len(read(tmp_path / 'run/target')['history']) == 3
    table = (tmp_path / 'run/report.md').read_text()
    assert f'| target | `{TINY}` | `repopt_sgd` | 3 |' in table
    assert table in capsys.readouterr().out
    assert (tmp_path / 'run/curves.png').exists()
    main(arguments('--search-first', *extra, '--search-kwargs', 'epochs=2', 'lr=0.01', '--resume'))


def test_a_published_model_is_fine_tuned_with_its_own_scales(arguments, tmp_path):
    scales = Scales.initial(tiny_model())
    save_pretrained(timm.create_model(TINY, num_classes=7, scales=scales), tmp_path / 'published')
    model = f'local-dir:{tmp_path / "published"}'
    main(arguments('--pretrained', '--epochs', '1', model=model))
    checkpoint = read(tmp_path / 'run')
    assert checkpoint['arch'] == TINY
    assert checkpoint['args'].opt == 'repopt_sgd'
    assert checkpoint['optimizer']['param_groups'][0]['scales_fingerprint'] == scales.fingerprint


def test_the_strides_of_a_published_model_are_those_of_the_checkpoint(arguments, tmp_path):
    strides = (1, 1, 2, 2, 2)
    scales = Scales.initial(tiny_model(strides=strides))
    published = timm.create_model(TINY, num_classes=7, scales=scales, strides=strides)
    save_pretrained(published, tmp_path / 'published')
    main(arguments('--pretrained', '--epochs', '1', model=f'local-dir:{tmp_path / "published"}'))
    loaded = model_from_checkpoint(tmp_path / 'run/last.pth.tar', need_scales=False)
    assert tuple(loaded.strides) == strides


def test_a_checkpoint_remembers_what_pretrained_weights_expect_of_images(arguments, tmp_path):
    published = timm.create_model(TINY, num_classes=7, scales=Scales.initial(tiny_model()), global_pool='max')
    expected = {'mean': (0.3, 0.4, 0.5), 'std': (0.1, 0.2, 0.3), 'crop_pct': 0.9, 'interpolation': 'bilinear'}
    published.pretrained_cfg |= expected
    save_pretrained(published, tmp_path / 'published')
    main(arguments('--pretrained', '--epochs', '1', model=f'local-dir:{tmp_path / "published"}'))
    loaded = model_from_checkpoint(tmp_path / 'run/last.pth.tar', need_scales=False)
    assert expected.items() <= timm.data.resolve_model_data_config(loaded).items()
    assert loaded.head.global_pool.pool_type == 'max'


def test_grey_images_have_one_channel(arguments):
    grey = '--in-chans 1 --input-size 1 32 32 --mean 0.5 --std 0.25 --epochs 1'
    main(arguments(*grey.split(), model=f'{TINY}_hs'))


def test_an_averaged_search_leaves_the_averaged_scales(arguments, tmp_path):
    main(arguments('--model-ema', '--model-ema-decay', '0.5', model=f'{TINY}_hs'))
    assert read_scale_file(tmp_path / 'run/scales.safetensors') == read_scale_file(tmp_path / 'run/last.pth.tar')


@pytest.mark.parametrize(
    ('extra', 'message'),
    [
        (['--pretrained'], r'has no scales, and none ship for it.*--scales initial'),
        (['--scales', 'initial', '--clip-grad', '1', '--clip-mode', 'agc'], 'breaks the equivalence'),
        (['--scales', 'initial', '--sync-bn'], '--sync-bn works on GPUs'),
        (['--scales', 'nowhere.safetensors'], 'No scales found'),
        (['--search-first', '--scales', 'initial'], 'does not go with --scales'),
        (
            ['--search-first', '--opt', 'repopt_adamw', '--lr', '0.001'],
            r'The search uses SGD.*--search-kwargs lr=0\.1\.',
        ),
        (['--scales', 'initial', '--batch-size', '999'], 'do not fill one batch of 999'),
        (['--model', 'repopt_vgg_a00'], "timm knows no model 'repopt_vgg_a00'. Did you mean repopt_vgg_a0"),
        (['--val-split', 'test'], "has no split 'test', but train, validation"),
        (['--search-kwargs', 'epoch=3'], "unknown argument 'epoch'. Did you mean 'epochs'"),
    ],
)
def test_mistakes_are_told_before_the_training(arguments, tmp_path, extra, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(arguments(*extra))
    assert not (tmp_path / 'run/last.pth.tar').exists()


def test_a_folder_that_is_not_there_is_named(arguments):
    with pytest.raises(FileNotFoundError, match=f"There is no image folder 'nowhere' in '{Path.cwd()}', expected"):
        main(['nowhere', *arguments('--scales', 'initial')[1:]])


def test_a_folder_whose_splits_number_their_classes_differently_is_refused(images, arguments, tmp_path):
    shutil.copytree(images, tmp_path / 'images')
    shutil.rmtree(tmp_path / 'images/train/dark')
    with pytest.raises(ValueError, match="The training images lack the class 'dark'"):
        main([str(tmp_path / 'images'), *arguments('--scales', 'initial')[1:]])


def test_resuming_with_other_scales_is_refused(arguments):
    main(arguments('--scales', 'initial', '--epochs', '1'))
    other = ['--scales', 'initial', '--model-kwargs', 'strides=(2,2,2,2,1)']
    with pytest.raises(ValueError, match='saved with the scales'):
        main(arguments(*other, '--epochs', '2', '--resume'))
