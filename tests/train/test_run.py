import csv
import signal
import socket
from argparse import Namespace

import pytest
import timm
import torch
from timm.models import resume_checkpoint

from repopt_timm import Scales, clip_grad_norm_, make_grad_mults, save_pretrained
from repopt_timm.checkpoint_model import model_from_checkpoint
from repopt_timm.scales import read_scale_file
from repopt_timm.train import run, schedule
from repopt_timm.train.command import main
from repopt_timm.train.parsing import parse_arguments
from repopt_timm.train.resolution import resolve
from repopt_timm.train.schedule import choose_schedule

from ..helpers import TINY, random_scales, tiny_model
from .runs import assert_same_bits, in_child, read


@pytest.mark.parametrize(
    ('model', 'extra'),
    [
        (TINY, '--workers 1 --scales initial --model-ema --reprob 0.5 --drop 0.3 --clip-grad 1 --sampler balanced'),
        (TINY, '--scales initial --opt lookahead_repopt_adamw --mixup 0.5 --sched plateau --patience-epochs 0'),
        (
            f'{TINY}_hs',
            '--grad-accum-steps 4 --aa rand-m9 --cache-images --model-kwargs strides=(2,1,2,2,2)',
        ),
    ],
    ids=['target', 'lookahead', 'search'],
)
def test_a_resumed_run_ends_with_the_same_bits(train, tmp_path, signalled, model, extra):
    train(extra, model=model, experiment='whole')
    signalled(signal.SIGINT, 3)
    with pytest.raises(SystemExit):
        train(extra, model=model, experiment='cut')
    train(f'{extra} --resume', model=model, experiment='cut')
    whole, cut = read(tmp_path / 'whole'), read(tmp_path / 'cut')
    assert_same_bits(whole['state_dict'], cut['state_dict'])
    assert_same_bits(whole.get('state_dict_ema', {}), cut.get('state_dict_ema', {}))
    assert whole['history'] == cut['history']


def test_accumulated_gradients_are_those_of_a_larger_batch(train, tmp_path):
    for name, batches in (('whole', '--batch-size 8'), ('parts', '--batch-size 4 --grad-accum-steps 2')):
        extra = f'--no-aug --opt sgd --epochs 1 --lr 0.1 --clip-grad 0.5 --warmup-epochs 0 {batches}'
        train(extra, model='test_convnext', experiment=name)
    whole, parts = (read(tmp_path / name)['state_dict'] for name in ('whole', 'parts'))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_two_processes_train_a_compiled_network_and_go_on_from_one_checkpoint_only(arguments, tmp_path):
    def launch(extra, **others):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = str(free.getsockname()[1])
        group = {'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
        processes = []
        for rank in '01':
            words = arguments(f'{shared} {extra}', experiment=others.get(rank, 'run'))
            processes.append(in_child(words, tmp_path / rank, RANK=rank, LOCAL_RANK=rank, **group))
        for process in processes:
            process.join()
        return [process.exitcode for process in processes], (tmp_path / '0').read_text()

    shared = '--torchcompile aot_eager --grad-accum-steps 2 --aug-repeats 2 --holdout 0.1'
    assert launch('--epochs 1')[0] == [0, 0]
    codes, told = launch('--epochs 2 --resume', **{'1': 'other'})
    assert codes == [1, 1] and 'different epochs: 1, 0, by rank' in told
    assert launch('--epochs 2 --resume')[0] == [0, 0]
    with open(tmp_path / 'run/classes.csv') as file:
        # An odd number, which timm's sampler fills up.
        assert sum(int(row['images']) for row in csv.DictReader(file)) == 5
    checkpoint = read(tmp_path / 'run')
    assert 'stem.conv.weight' in checkpoint['state_dict'] and len(checkpoint['history']) == 2


def test_a_search_leaves_its_scales_with_their_provenance(searched):
    scales = read_scale_file(searched / 'scales.safetensors')
    assert scales == read_scale_file(searched / 'last.pth.tar')
    assert scales != Scales.initial(tiny_model(strides=(2, 1, 2, 2, 2)))
    assert (scales.provenance['epochs'], scales.provenance['seed']) == (3, 1)


def test_a_target_learns_writes_its_epochs_and_timm_reads_its_checkpoint(trained):
    checkpoint, last = read(trained), str(trained / 'last.pth.tar')
    assert (checkpoint['args'].opt, checkpoint['label_names']) == ('repopt_sgd', ['dark', 'light'])
    rows, times = (list(csv.DictReader((trained / name).open())) for name in ('summary.csv', 'times.csv'))
    assert [row['epoch'] for row in rows] == [row['epoch'] for row in times] == ['1', '2', '3']
    assert float(rows[-1]['eval_top1']) >= 50
    assert list(trained.glob('events*'))
    model = timm.create_model(TINY, num_classes=2, scales='initial', checkpoint_path=last)
    assert_same_bits(model.state_dict(), checkpoint['state_dict'])
    optimizer = timm.optim.create_optimizer_v2(model, 'repopt_sgd', lr=1.0, weight_decay=2e-5)
    assert resume_checkpoint(model, last, optimizer) == 3


@pytest.mark.parametrize(
    ('model', 'extra'),
    [
        (TINY, '--scales initial --amp --amp-dtype bfloat16 --channels-last --momentum 0.8'),
        (f'{TINY}_hs', '--amp --in-chans 1 --input-size 1 32 32 --mean 0.5 --momentum 0.8'),
        ('test_byobnet', '--bce-loss --bce-sum --bce-target-thresh 0.2 --momentum 0.8'),
        ('test_byobnet', '--drop-path 0.2 --warmup-prefix --momentum 0.8 --opt-kwargs nesterov=false'),
    ],
)
def test_other_networks_and_recipes_train_too(train, tmp_path, model, extra):
    train(f'--epochs 1 {extra}', model=model)
    groups = read(tmp_path / 'run')['optimizer']['param_groups']
    assert {(group['momentum'], group['nesterov']) for group in groups} == {(0.8, 'nesterov' not in extra)}


@pytest.mark.parametrize('capability', ['AVX2', 'AVX512'])
def test_a_warning_names_the_flag_where_lower_precision_is_slow(capability, monkeypatch, caplog):
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    for words in (['--device', 'cpu'], ['--device', 'cpu', '--amp', '--amp-dtype', 'bfloat16']):
        caplog.clear()
        run.prepare_device(parse_arguments(words))
        assert ('--no-amp' in caplog.text) == ('--amp' in words and capability == 'AVX2')


@pytest.mark.parametrize('name', ['repopt_sgd', 'repopt_adamw', 'sgd'])
def test_repoptimizers_are_clipped_by_the_csla_norm_and_the_classifier_not_adaptively(name):
    model = tiny_model(scales=random_scales())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    optimizer = timm.optim.create_optimizer_v2(model, name, lr=1.0)
    if name == 'sgd':
        run.make_clip(Namespace(clip_grad=0.01, clip_mode='agc'), model, optimizer)()
        assert model.get_classifier().weight.grad.max() == 100 and model.stem.conv.weight.grad.max() < 1
    else:
        norm = clip_grad_norm_(model.parameters(), 1e9, make_grad_mults(model))
        assert run.make_clip(Namespace(clip_grad=2.0, clip_mode='norm'), model, optimizer)() == norm
        assert model.stem.conv.weight.grad.max().item() == pytest.approx(100 * 2 / norm.item(), rel=1e-4)


def test_a_published_model_is_fine_tuned_with_its_own_scales_strides_and_images(train, tmp_path):
    strides = (1, 1, 2, 2, 2)
    scales = Scales.initial(tiny_model(strides=strides))
    published = timm.create_model(TINY, num_classes=7, scales=scales, strides=strides, global_pool='max')
    expected = {'mean': (0.3, 0.4, 0.5), 'std': (0.1, 0.2, 0.3), 'crop_pct': 0.9, 'interpolation': 'bilinear'}
    published.pretrained_cfg |= expected
    save_pretrained(published, tmp_path / 'published')
    train('--pretrained --epochs 1', model=f'local-dir:{tmp_path / "published"}')
    checkpoint = read(tmp_path / 'run')
    assert (checkpoint['arch'], checkpoint['args'].opt) == (TINY, 'repopt_sgd')
    assert checkpoint['optimizer']['param_groups'][0]['scales_fingerprint'] == scales.fingerprint
    loaded = model_from_checkpoint(tmp_path / 'run/last.pth.tar', need_scales=False)
    assert tuple(loaded.strides) == strides
    assert expected.items() <= timm.data.resolve_model_data_config(loaded).items()
    assert loaded.head.global_pool.pool_type == 'max'


def test_a_run_that_does_not_improve_stops_and_stays_stopped(train, tmp_path, tops):
    tops += [50.0, 60.0, 40.0, 60.0, 55.0, 99.0]
    for _ in range(2):
        train('--epochs 6 --patience 2 --resume')
        assert len(read(tmp_path / 'run')['history']) == 4


def test_mixup_ends_where_it_shall_and_each_epoch_draws_other_images(train, monkeypatch):
    mixed, orders = [], []

    def train_one_epoch(state, loader, *args):
        _, target = next(iter(loader))
        mixed.append(((target > 0).sum(1) > 1).any().item())
        orders.append(loader.dataset.order)
        return {'lr': 0.1, 'loss': 1.0}

    monkeypatch.setattr(run, 'train_one_epoch', train_one_epoch)
    train('--mixup 1 --mixup-off-epoch 1 --smoothing 0 --epochs 2 --sampler balanced')
    assert mixed == [True, False] and orders[0] != orders[1]


def test_a_run_that_gets_fewer_epochs_than_it_was_to_have_is_evaluated(train, tmp_path, signalled):
    long = '--epochs 400 --val-interval 400'
    signalled(signal.SIGINT, 3)
    with pytest.raises(SystemExit):
        train(long)
    train(f'{long} --epochs 2 --resume')
    assert 'eval_top1' in read(tmp_path / 'run')['history'][-1]
    assert (tmp_path / 'run/report.md').exists()


@pytest.mark.parametrize(
    ('given', 'chosen'),
    [
        ((20,), (4, True)),
        ((49,), (5, True)),
        ((50,), (5, False)),
        ((5, 'cosine', 3), (3, True)),
        # It waits for the accuracy after an epoch.
        ((14, 'plateau'), (2, False)),
    ],
)
def test_a_run_warms_up_for_a_fifth_of_its_epochs_and_by_updates_if_they_are_few(given, chosen):
    assert choose_schedule(*given) == chosen


@pytest.mark.parametrize(
    ('words', 'lr'),
    [
        ('-b 512', 0.2),
        ('-b 64 --grad-accum-steps 2', 0.05),
        ('-b 64 --opt repopt_adamw', 0.05),
        ('-b 64 --opt adamw --lr-base-scale linear', 0.025),
        ('-b 512 --lr 0.3', 0.3),
    ],
)
def test_without_a_learning_rate_the_base_one_is_scaled_with_the_batch(words, lr, tmp_path):
    args = parse_arguments([str(tmp_path), '--output', str(tmp_path / 'out'), *words.split()])
    args.rank, args.world_size = 0, 1
    assert resolve(args).lr == pytest.approx(lr)


def test_a_run_that_is_resumed_keeps_its_warm_up(arguments, tmp_path):
    words = arguments('--scales initial --sched step --epochs 4')
    given = words.index('--warmup-epochs')
    del words[given : given + 2]
    main(words)
    main([*words, '--epochs', '5', '--resume'])
    args, history = read(tmp_path / 'run')['args'], read(tmp_path / 'run')['history']
    assert [row['lr'] for row in history] == [1e-5, *[0.02] * 4]
    assert (args.warmup_epochs, args.sched_on_updates) == (0.8, True)


def test_a_schedule_that_timm_does_not_have_is_refused_and_a_warm_up_that_is_never_over_is_said(
    train, monkeypatch, capsys
):
    monkeypatch.setattr(schedule, 'create_scheduler_v2', lambda *args, **kwargs: (None, 5))
    with pytest.raises(ValueError, match="'cosine'"):
        train('--epochs 1')
    assert 'never reaches 0.02: lower --warmup-epochs' in capsys.readouterr().err
    train('--sched none --epochs 1')
