import csv
import shutil
import subprocess
import sys
import tarfile
from argparse import Namespace

import pytest
import timm
import torch
from timm.models import resume_checkpoint

from repopt_timm import Scales, save_pretrained
from repopt_timm.checkpoint_model import model_from_checkpoint
from repopt_timm.datasets import core_count
from repopt_timm.scales import read_scale_file
from repopt_timm.train import run
from repopt_timm.train.command import main

from ..helpers import TINY, tiny_model
from .runs import ENVIRONMENT, TARGET, assert_same_bits, read


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


@pytest.mark.parametrize(
    ('model', 'extra'),
    [
        (TINY, '--workers 2 --scales initial --model-ema --reprob 0.5 --drop 0.3 --clip-grad 1 --sampler balanced'),
        (TINY, '--scales initial --opt lookahead_repopt_adamw --mixup 0.5 --sched plateau --class-weights balanced'),
        (f'{TINY}_hs', '--workers 2 --grad-accum-steps 4 --aa rand-m9 --no-prefetcher --patience 9'),
    ],
    ids=['target', 'lookahead', 'search'],
)
def test_a_resumed_run_ends_with_the_same_bits(arguments, tmp_path, monkeypatch, model, extra):
    extra = extra.split()
    main(arguments(*extra, model=model, experiment='whole'))
    with monkeypatch.context() as patch, pytest.raises(BrokenOffError):
        interrupt_after(patch, 2)
        main(arguments(*extra, model=model, experiment='cut'))
    main(arguments(*extra, '--resume', model=model, experiment='cut'))
    whole, cut = read(tmp_path / 'whole'), read(tmp_path / 'cut')
    assert_same_bits(whole['state_dict'], cut['state_dict'])
    assert_same_bits(whole.get('state_dict_ema', {}), cut.get('state_dict_ema', {}))
    assert whole['history'] == cut['history']
    assert (tmp_path / 'whole/summary.csv').read_text() == (tmp_path / 'cut/summary.csv').read_text()


@pytest.mark.slow
def test_processes_that_find_different_checkpoints_do_not_go_on(arguments, tmp_path):
    main(arguments(*TARGET, '--epochs', '1'))
    (tmp_path / 'train.py').write_text(
        'import os, sys\nfrom repopt_timm.cli import main\n'
        "sys.exit(main(['train', *sys.argv[1:], *(['--experiment', 'other'] if os.environ['RANK'] == '1' else [])]))"
    )
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    command = [*launch, str(tmp_path / 'train.py'), *arguments(*TARGET, '--resume')]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert done.returncode
    assert 'different epochs: 1, 0, by rank' in done.stderr


@pytest.mark.slow
def test_two_processes_train_a_compiled_network_together(arguments, tmp_path):
    launch = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', '-m', 'repopt_timm.cli', 'train']
    extra = [*TARGET, '--epochs', '1', '--torchcompile', 'aot_eager', '--grad-accum-steps', '2', '--aug-repeats', '2']
    subprocess.run([sys.executable, *launch, *arguments(*extra)], env=ENVIRONMENT, check=True)
    assert 'stem.conv.weight' in read(tmp_path / 'run')['state_dict']


def test_a_search_leaves_its_scales_with_their_provenance(searched):
    scales = read_scale_file(searched / 'scales.safetensors')
    assert scales == read_scale_file(searched / 'last.pth.tar')
    assert scales != Scales.initial(tiny_model(strides=(2, 1, 2, 2, 2)))
    assert (scales.provenance['epochs'], scales.provenance['seed']) == (3, 1)


def test_the_names_of_the_classes_go_into_the_checkpoint_and_from_there_into_a_repository(trained, tmp_path):
    assert read(trained)['label_names'] == ['dark', 'light']
    save_pretrained(trained / 'last.pth.tar', tmp_path / 'saved', scales=Scales.initial(tiny_model()))
    loaded = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True)
    assert list(loaded.pretrained_cfg['label_names']) == ['dark', 'light']


def test_the_numbers_of_a_network_are_those_of_the_run_of_its_checkpoint_and_of_what_is_resumed(arguments, tmp_path):
    numbers = ['--model-kwargs', 'depths=(1,1)', 'widths=(8,8,16)', 'strides=(1,2,2)', '--warmup-epochs', '0']
    for epochs in ('1', '2'):
        main(arguments(*numbers, '--epochs', epochs, '--resume', model=f'{TINY}_branches'))
    model = model_from_checkpoint(tmp_path / 'run/last.pth.tar')
    assert (model.depths, model.widths, model.strides) == ((1, 1), (8, 8, 16), (1, 2, 2))


@pytest.mark.parametrize(
    ('model', 'extra'),
    [
        (f'{TINY}_csla', '--scales initial'),
        ('test_byobnet', ''),
        (TINY, '--amp --amp-dtype bfloat16 --channels-last --log-tensorboard'),
        (TINY, '--amp --amp-dtype float16'),
        (f'{TINY}_hs', '--in-chans 1 --input-size 1 32 32 --mean 0.5 --std 0.25'),
        ('test_byobnet', '--bce-loss --bce-sum --bce-target-thresh 0.2 --bce-pos-weight 2 --class-weights balanced'),
        ('test_byobnet', '--drop-path 0.2 --warmup-prefix'),
    ],
)
def test_other_networks_and_recipes_train_too(arguments, tmp_path, model, extra):
    main(arguments('--epochs', '1', *extra.split(), model=model))
    assert read(tmp_path / 'run')['epoch'] >= 0


@pytest.mark.parametrize(('mode', 'classifier'), [('agc', 100.0), ('value', 0.01)])
def test_adaptive_clipping_leaves_the_classifier_out(mode, classifier):
    model = timm.create_model('test_byobnet', num_classes=5)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    run._make_clip(Namespace(clip_grad=0.01, clip_mode=mode), model, torch.optim.SGD(model.parameters()))()
    assert model.get_classifier().weight.grad.max() == pytest.approx(classifier)
    assert all(conv.weight.grad.max() < 1 for conv in model.modules() if isinstance(conv, torch.nn.Conv2d))


def test_a_compiled_run_resumes_like_any_other(arguments, tmp_path):
    extra = [*TARGET, '--torchcompile', 'aot_eager', '--momentum', '0.8', '--opt-kwargs', 'nesterov=false']
    main(arguments(*extra, '--epochs', '1'))
    main(arguments(*extra, '--epochs', '2', '--resume'))
    checkpoint = read(tmp_path / 'run')
    assert 'stem.conv.weight' in checkpoint['state_dict']
    groups = checkpoint['optimizer']['param_groups']
    assert {(group['momentum'], group['nesterov']) for group in groups} == {(0.8, False)}


def test_archives_are_data_too(arguments, images, tmp_path):
    for split in ('train', 'validation'):
        with tarfile.open(tmp_path / f'{split}.tar', 'w') as archive:
            archive.add(images / split, split)
    extra = ['--train-split', 'train.tar', '--val-split', 'validation.tar', '--data-dir', str(tmp_path)]
    main([*arguments(*TARGET, '--epochs', '1', *extra)[1:]])
    assert len(read(tmp_path / 'run')['state_dict']['head.fc.bias']) == 2


def test_a_target_learns_and_writes_its_epochs(trained):
    assert read(trained)['args'].opt == 'repopt_sgd'
    rows, times = (list(csv.DictReader((trained / name).open())) for name in ('summary.csv', 'times.csv'))
    assert [row['epoch'] for row in rows] == [row['epoch'] for row in times] == ['1', '2', '3']
    assert float(rows[-1]['eval_top1']) >= 50


def test_timm_reads_the_checkpoints(trained):
    last = trained / 'last.pth.tar'
    model = timm.create_model(TINY, num_classes=2, scales='initial', checkpoint_path=last)
    assert_same_bits(model.state_dict(), read(trained)['state_dict'])
    optimizer = timm.optim.create_optimizer_v2(model, 'repopt_sgd', lr=1.0, weight_decay=2e-5)
    assert resume_checkpoint(model, str(last), optimizer) == 3


def test_only_the_best_checkpoints_are_kept(arguments, tmp_path, copied):
    main(arguments(*TARGET, '--epochs', '5', '--checkpoint-hist', '2', '--resume'))
    kept = sorted(path.name for path in (tmp_path / 'run').glob('*.pth.tar'))
    history = read(tmp_path / 'run')['history']
    best = sorted(history, key=lambda row: (-row['eval_top1'], row['epoch']))[:2]
    numbered = {f'checkpoint-{row["epoch"]}.pth.tar' for row in best}
    assert set(kept) == numbered | {'last.pth.tar', 'model_best.pth.tar'}
    assert read(tmp_path / 'run', 'model_best.pth.tar')['epoch'] == best[0]['epoch']


def test_the_whole_way_in_one_call(arguments, tmp_path, capsys):
    extra = ['--search-first', '--weight-decay', '5e-4', '--epochs', '2']
    main(arguments(*extra, '--opt-kwargs', 'grad_mults=None'))
    search, target = read(tmp_path / 'run/search'), read(tmp_path / 'run/target')
    assert (search['args'].weight_decay, target['args'].weight_decay) == (4e-5, 5e-4)
    assert target['args'].scales == str(tmp_path / 'run/search/scales.safetensors')
    table = (tmp_path / 'run/report.md').read_text()
    assert f'| target | `{TINY}` | `repopt_sgd` | 2 |' in table
    assert table in capsys.readouterr().out
    main(arguments(*extra, '--resume'))


def test_a_published_model_is_fine_tuned_with_its_own_scales_strides_and_images(arguments, tmp_path):
    strides = (1, 1, 2, 2, 2)
    scales = Scales.initial(tiny_model(strides=strides))
    published = timm.create_model(TINY, num_classes=7, scales=scales, strides=strides, global_pool='max')
    expected = {'mean': (0.3, 0.4, 0.5), 'std': (0.1, 0.2, 0.3), 'crop_pct': 0.9, 'interpolation': 'bilinear'}
    published.pretrained_cfg |= expected
    save_pretrained(published, tmp_path / 'published')
    main(arguments('--pretrained', '--epochs', '1', model=f'local-dir:{tmp_path / "published"}'))
    checkpoint = read(tmp_path / 'run')
    assert (checkpoint['arch'], checkpoint['args'].opt) == (TINY, 'repopt_sgd')
    assert checkpoint['optimizer']['param_groups'][0]['scales_fingerprint'] == scales.fingerprint
    loaded = model_from_checkpoint(tmp_path / 'run/last.pth.tar', need_scales=False)
    assert tuple(loaded.strides) == strides
    assert expected.items() <= timm.data.resolve_model_data_config(loaded).items()
    assert loaded.head.global_pool.pool_type == 'max'


def test_an_averaged_search_leaves_the_averaged_scales(arguments, tmp_path):
    main(arguments('--model-ema', '--model-ema-decay', '0.5', model=f'{TINY}_hs'))
    assert read_scale_file(tmp_path / 'run/scales.safetensors') == read_scale_file(tmp_path / 'run/last.pth.tar')


def test_a_folder_whose_splits_number_their_classes_differently_is_refused(images, arguments, tmp_path):
    shutil.copytree(images, tmp_path / 'images')
    shutil.rmtree(tmp_path / 'images/train/dark')
    with pytest.raises(ValueError, match='dark'):
        main([str(tmp_path / 'images'), *arguments(*TARGET)[1:]])


def test_resuming_with_other_scales_is_refused(arguments, copied):
    with pytest.raises(ValueError, match='saved with the scales'):
        main(arguments(*TARGET, '--model-kwargs', 'strides=(2,2,2,2,1)', '--resume'))


def test_there_are_not_more_workers_than_cores(arguments, tmp_path, recwarn):
    main(arguments(*TARGET, '--epochs', '1', '--workers', '64'))
    assert not any('worker' in str(warning.message) for warning in recwarn)
    assert read(tmp_path / 'run')['args'].workers == core_count()


@pytest.fixture
def unequal(images, tmp_path):
    """One class has 24 images and the other two."""
    shutil.copytree(images, tmp_path / 'unequal')
    for path in sorted((tmp_path / 'unequal/train/dark').iterdir())[2:]:
        path.unlink()
    return str(tmp_path / 'unequal')


def test_classes_of_unequal_size_are_told_and_weighed_on_request(unequal, arguments, tmp_path, capsys, monkeypatch):
    words = [unequal, *arguments(*TARGET, '--epochs', '1')[1:]]
    main(words)
    assert 'largest class has 24 images, the smallest 2' in capsys.readouterr().err
    losses = []
    original = run._make_loss
    monkeypatch.setattr(run, '_make_loss', lambda *args: losses.append(original(*args)) or losses[0])
    main([*words, '--experiment', 'weighted', '--class-weights', 'balanced'])
    assert losses[0].weight.tolist() == pytest.approx([26 / 4, 26 / 48])
    assert 'largest class' not in capsys.readouterr().err


def test_a_balanced_sampler_draws_all_classes_alike_and_others_each_epoch(unequal, arguments):
    from repopt_timm.train.loaders import make_datasets
    from repopt_timm.train.parsing import parse_arguments

    train, validation = make_datasets(parse_arguments([unequal, *arguments('--sampler', 'balanced')[1:]]))
    drawn = []
    for epoch in range(40):
        train.set_epoch(epoch)
        drawn.append([label for _, label in train])
    assert len(train) == 26 and len(set(map(tuple, drawn))) > 30
    assert sum(map(sum, drawn)) / (40 * 26) == pytest.approx(0.5, abs=0.05)
    assert len(validation) == 16


def test_a_run_that_does_not_improve_stops_and_stays_stopped(arguments, tmp_path, monkeypatch):
    tops = [50.0, 60.0, 40.0, 60.0, 55.0, 99.0]
    found = torch.zeros(2, 16, dtype=torch.int64)
    monkeypatch.setattr(
        'repopt_timm.train.engine.validate', lambda *args: ({'loss': 1.0, 'top1': tops.pop(0), 'top5': 100.0}, found)
    )
    for _ in range(2):
        main(arguments(*TARGET, '--epochs', '6', '--patience', '2', '--resume'))
        assert len(read(tmp_path / 'run')['history']) == 4


@pytest.mark.parametrize('extra', [[], ['--no-prefetcher']])
def test_mixup_ends_where_it_shall(arguments, monkeypatch, extra):
    mixed = []

    def train_one_epoch(state, loaders, *args):
        images, target = next(iter(loaders.train))
        target = target if loaders.mixup is None else loaders.mixup(images, target)[1]
        mixed.append(((target > 0).sum(1) > 1).any().item())
        return {'lr': 0.1, 'loss': 1.0}

    monkeypatch.setattr(run, 'train_one_epoch', train_one_epoch)
    main(arguments(*TARGET, '--mixup', '1', '--mixup-off-epoch', '1', '--smoothing', '0', '--epochs', '2', *extra))
    assert mixed == [True, False]


def test_a_run_that_gets_fewer_epochs_than_it_was_to_have_is_evaluated(arguments, tmp_path, monkeypatch):
    long = [*TARGET, '--epochs', '400', '--val-interval', '400']
    with monkeypatch.context() as patch, pytest.raises(BrokenOffError):
        interrupt_after(patch, 2)
        main(arguments(*long))
    main(arguments(*long, '--epochs', '2', '--resume'))
    assert 'eval_top1' in read(tmp_path / 'run')['history'][-1]
    assert (tmp_path / 'run/report.md').exists()
