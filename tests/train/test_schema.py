import argparse

import pytest
import yaml

from repopt_timm.train.parsing import make_parser, parse_arguments, read_config, write_config
from repopt_timm.train.schema import ARGUMENTS, SECTIONS

# Those of timm 1.0.31's training script, whose file is not part of its package.
TIMM = """
dataset '' train_split 'train' val_split 'validation' train_num_samples None val_num_samples None dataset_download False
class_map '' input_img_mode None input_key None target_key None pretrained False initial_checkpoint '' num_classes None
gp None img_size None in_chans None input_size None crop_pct None mean None std None interpolation '' batch_size 128
validation_batch_size None channels_last False grad_accum_steps 1 grad_checkpointing False model_kwargs {}
torchcompile None amp False amp_dtype 'float16' opt_eps None opt_betas None momentum 0.9 weight_decay 2e-5
clip_grad None clip_mode 'norm' layer_decay None opt_kwargs {} sched 'cosine' sched_on_updates False lr None lr_base 0.1
lr_base_size 256 lr_base_scale '' warmup_lr 1e-5 min_lr 0 epochs 300 cooldown_epochs 0 decay_epochs 90
decay_milestones [90,180,270] decay_rate 0.1 patience_epochs 10 no_aug False train_crop_mode None scale [0.08,1.0]
hflip 0.5 vflip 0 color_jitter 0.4 aa None reprob 0 remode 'pixel' recount 1 mixup 0 cutmix 0
mixup_prob 1 mixup_switch_prob 0.5 mixup_mode 'batch' mixup_off_epoch 0 bce_loss False smoothing 0.1
train_interpolation 'random' drop 0 sync_bn False dist_bn 'reduce' model_ema False model_ema_decay 0.9998
model_ema_warmup False seed 42 log_interval 50 val_interval 1 workers 4 pin_mem False no_prefetcher False experiment ''
log_wandb False
"""
# On purpose: our models, the fastest device, a folder that always is, few files, and a warm-up that ends.
OURS = {'model', 'device', 'opt', 'output', 'checkpoint_hist', 'resume', 'data_dir', 'ratio', 'warmup_epochs'}
NEW = {
    'scales',
    'override',
    'search_first',
    'search_kwargs',
    'log_tensorboard',
    'debug',
    'train_images',
    'holdout',
    'cache_images',
}


def test_names_and_defaults_are_those_of_timms_script():
    words = TIMM.split()
    expected = {name: yaml.safe_load(value) for name, value in zip(words[::2], words[1::2])}
    expected = {name: None if value == 'None' else value for name, value in expected.items()}
    found = {name: argument.default for name, argument in ARGUMENTS.items() if name not in OURS | NEW}
    assert found == {
        name: float(value)
        if ARGUMENTS[name].kind is float and value is not None and not isinstance(value, list)
        else value
        for name, value in expected.items()
    }


def test_every_argument_is_in_one_section_and_has_a_help_and_a_default_that_it_can_have():
    arguments = [argument for section in SECTIONS.values() for argument in section]
    assert len({argument.name for argument in arguments}) == len(arguments)
    for argument in arguments:
        assert argument.help
        assert argument.check(argument.default, argument.name) == argument.default


def test_the_help_shows_every_flag_and_choice():
    text = make_parser().format_help()
    for argument in ARGUMENTS.values():
        assert argument.flag in text
    assert 'rrc, rkrc, rkrr' in text


def test_a_config_gives_defaults_that_the_command_line_overrides(tmp_path):
    config = tmp_path / 'config.yaml'
    config.write_text('model: repopt_vgg_a1\nlr: 0.3\nmodel_kwargs: {use_se: true}\n')
    args = parse_arguments(['-c', str(config), '--lr', '0.4'])
    assert (args.model, args.lr, args.model_kwargs) == ('repopt_vgg_a1', 0.4, {'use_se': True})
    config.write_text('search_kwargs: {weight_decay: 4e-5}\ncolor_jitter: null\n')
    args = parse_arguments(['-c', str(config)])
    assert (args.search_kwargs, args.color_jitter) == ({'weight_decay': 0.00004}, None)


def test_capitals_in_the_name_of_an_optimizer_do_not_matter(tmp_path):
    (tmp_path / 'config.yaml').write_text('opt: RepOpt_AdamW\nsearch_kwargs: {opt: AdamW}\n')
    args = parse_arguments(['-c', str(tmp_path / 'config.yaml')])
    assert (args.opt, args.search_kwargs['opt']) == ('repopt_adamw', 'adamw')
    assert parse_arguments(['--opt', 'AdamW']).opt == 'adamw'


def test_the_folder_of_the_command_line_goes_before_that_of_the_config(tmp_path):
    (tmp_path / 'config.yaml').write_text('data: configured\n')
    for words in (['given'], ['--data-dir', 'given']):
        assert parse_arguments(['-c', str(tmp_path / 'config.yaml'), *words]).data_dir == 'given'
    assert parse_arguments(['-c', str(tmp_path / 'config.yaml')]).data_dir == 'configured'


def test_search_arguments_have_the_types_of_the_others():
    words = ['--search-first', '--search-kwargs', 'epochs=2', 'lr=1e-3', 'scale=(0.5,1)', 'data=2024', 'amp=True']
    expected = {'epochs': 2, 'lr': 0.001, 'scale': [0.5, 1.0], 'data_dir': '2024', 'amp': True}
    assert parse_arguments(words).search_kwargs == expected


@pytest.mark.parametrize('words', [['x'], ['-c', 'quickstart'], ['x', '--opt-betas', '0.9', '0.99', '--mean', '0.5']])
def test_written_arguments_are_read_as_they_were(tmp_path, words):
    args = parse_arguments(words)
    (tmp_path / 'args.yaml').write_text(write_config(args))
    again = parse_arguments(['-c', str(tmp_path / 'args.yaml')])
    assert vars(again) == vars(argparse.Namespace(**{**vars(args), 'config': str(tmp_path / 'args.yaml')}))


@pytest.mark.parametrize(
    'words', [['photos_\udce9'], ['--data-dir', 'photos_\udce9'], ['--search-kwargs', 'data=\udce9']]
)
def test_a_name_that_a_config_cannot_hold_is_refused(words):
    with pytest.raises(ValueError, match=r"is '.*\\udce9', expected UTF-8: rename the file or folder"):
        parse_arguments(words)


def test_a_config_that_would_take_forever_to_read_is_refused(tmp_path):
    for text, message in (
        (f'lr: 1{":1" * 150_000}\n', 'a number of 300001 characters'),
        ('a: &a [x, x]\nb: [*a, *a]\n', 'it uses a YAML alias'),
        ('# x\n' * 300_000, 'more than 1048576 bytes'),
    ):
        (tmp_path / 'args.yaml').write_text(text)
        with pytest.raises(ValueError, match=rf"args.yaml' is not a YAML file .*{message}"):
            read_config(str(tmp_path / 'args.yaml'))
