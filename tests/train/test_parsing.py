import pytest
import yaml

from repopt_timm.sources import resource_dir
from repopt_timm.train.parsing import ARGUMENTS, parse_arguments, read_config, write_config

# What timm's script does not have.
NEW = {'scales', 'init', 'override', 'search_first', 'log_tensorboard', 'debug', 'train_images', 'holdout'}
NEW |= {'cache_images', 'sampler', 'class_weights', 'patience'}
# What is not built here, at timm's defaults.
NOT_BUILT = {'amp_impl': 'native', 'aug_splits': 0, 'jsd_loss': False, 'kd_model_kwargs': {}, 'lr_noise': None}
NOT_BUILT |= {'lr_noise_pct': 0.67, 'fuser': '', 'tta': 0, 'wandb_tags': [], 'worker_seeding': 'all'}


def config(tmp_path, text):
    (tmp_path / 'config.yaml').write_text(text)
    return ['-c', str(tmp_path / 'config.yaml')]


def test_a_config_gives_defaults_that_the_command_line_overrides(tmp_path):
    text = 'data: configured\nlr: 4e-2\nmodel_kwargs: {use_se: true}\ncolor_jitter: null\nopt: RepOpt_AdamW\n'
    args = parse_arguments(config(tmp_path, text))
    assert (args.data_dir, args.lr, args.model_kwargs) == ('configured', 0.04, {'use_se': True})
    assert (args.color_jitter, args.opt) == (None, 'repopt_adamw')
    for folder in (['given'], ['--data-dir', 'given']):
        args = parse_arguments([*config(tmp_path, text), *folder, '--lr', '0.4'])
        assert (args.data_dir, args.lr) == ('given', 0.4)


def test_the_command_line_turns_off_what_shipped_configs_turn_on():
    assert parse_arguments(['x', '-c', 'cifar10_target']).amp
    args = parse_arguments(['x', '-c', 'cifar10_target', '--no-amp', '--no-channels-last'])
    assert not args.amp and not args.channels_last


@pytest.mark.parametrize(
    ('text', 'value'),
    [
        *[('false', False), ('False', False), ('true', True), ('null', None), ('None', None), ('relu', 'relu')],
        *[('1e-3', 0.001), ('2', 2), ('(1,2)', (1, 2)), ('[1, 2]', [1, 2]), ('', None)],
    ],
)
def test_values_of_pairs_are_literals_or_yaml_scalars(text, value):
    assert parse_arguments(['--opt-kwargs', f'name={text}']).opt_kwargs == {'name': value}


CONFIGS = [['x', '-c', path.stem] for path in resource_dir('configs').glob('*.yaml')]


@pytest.mark.parametrize('words', [['x'], *CONFIGS, ['x', '--opt-betas', '0.9', '0.99', '--mean', '0.5']])
def test_written_arguments_are_read_as_they_were(tmp_path, words):
    args = parse_arguments(words)
    again = config(tmp_path, write_config(args))
    assert vars(parse_arguments(again)) == {**vars(args), 'config': again[1]}


def of_timms_script(**changes):
    """The arguments of a run of timm's script, which writes all of them."""
    ours = {name: action.default for name, action in ARGUMENTS.items() if name not in NEW} | {'ratio': [0.75, 4 / 3]}
    script = {'model': 'resnet18', 'opt': 'sgd', 'output': '', 'resume': '', 'checkpoint_hist': 10, 'device': 'cpu'}
    return {**NOT_BUILT, **ours, **script, 'data': None, 'data_dir': 'photos', 'warmup_epochs': 5, **changes}


def test_a_config_that_timms_script_wrote_is_taken_at_its_word(tmp_path):
    recipe = of_timms_script(warmup_prefix=True, bce_loss=True, bce_target_thresh=0.2, crop_pct=0.95, drop_path=0.1)
    args = vars(parse_arguments(config(tmp_path, yaml.safe_dump(recipe))))
    found = {name: args[name] for name in recipe if name in ARGUMENTS}
    assert found == {**{name: recipe[name] for name in found}, 'output': 'output', 'resume': None}


def test_what_is_not_built_of_timms_script_is_told_at_once(tmp_path):
    recipe = of_timms_script(jsd_loss=True, drop_connect=0.2, lr_noise=[0.4, 0.9], epoch=3)
    with pytest.raises(ValueError) as error:
        read_config(config(tmp_path, yaml.safe_dump(recipe))[1])
    assert all(name in str(error.value) for name in ('jsd_loss', 'drop_path', 'lr_noise', "mean 'epochs'"))
    assert 'amp_impl' not in str(error.value)
