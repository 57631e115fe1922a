import io
import json
import os
import re
import subprocess
import sys

import pytest
import torch

import repopt_timm
from repopt_timm import load_scales
from repopt_timm.cli import main
from repopt_timm.commands import COMMANDS

from .helpers import TINY, random_scales, save_unknown_twin, tiny_model


@pytest.fixture
def help_of(monkeypatch, capsys):
    """Returns the help of a command, on one line."""
    # Words with a hyphen are broken at the end of a line.
    monkeypatch.setenv('COLUMNS', '1000')

    def show(command):
        with pytest.raises(SystemExit, match='0'):
            main([*command.split(), '--help'])
        return ' '.join(capsys.readouterr().out.split())

    return show


@pytest.fixture
def search(tmp_path):
    """The checkpoint of a search."""
    model = tiny_model('_hs', scales=random_scales())
    torch.save({'state_dict': model.state_dict(), 'arch': f'{TINY}_hs'}, tmp_path / 'last.pth.tar')
    return tmp_path / 'last.pth.tar'


def test_scales_go_from_a_checkpoint_to_files_and_folders(search, tmp_path, capsys):
    file, folder = tmp_path / 'scales.safetensors', tmp_path / 'folder'
    assert main(['scales', 'extract', str(search), str(file)]) == 0
    assert main(['scales', 'extract', str(file), str(folder)]) == 0
    assert main(['scales', 'plot', str(folder), str(tmp_path / 'scales.png')]) == 0
    capsys.readouterr()
    for source in (search, file, folder, folder / 'README.md'):
        assert main(['scales', 'show', str(source), '--json']) == 0
        assert json.loads(capsys.readouterr().out)['fingerprint'] == load_scales(search).fingerprint


def test_a_table_is_shown_on_a_terminal(capsys):
    assert main(['scales', 'show', 'initial', '--architecture', 'repopt_vgg_b1']) == 0
    out = capsys.readouterr().out
    assert 'initial values, not searched' in out
    assert '| stage 3 | identity | 1.0000 | 1.0000 | 1.0000 |' in out


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['scales', 'show', 'nowhere'], "'nowhere' is not a file"),
        (['scales', 'show', 'hf-hub:a/b@'], 'names no revision'),
        (
            ['scales', 'show', 'initial'],
            "scales='initial' needs a model",
        ),
        (['convert-checkpoint', 'x.pth'], 'Name a folder'),
        (
            ['train', '--scales', 'nowhere', '--dataset', 'digits', '--output', '{tmp}', '--data-dir', '{tmp}'],
            'nowhere',
        ),
    ],
)
def test_an_error_is_one_clear_line(arguments, message, tmp_path, capsys):
    assert main([argument.replace('{tmp}', str(tmp_path)) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith('error: ')
    assert message in error
    assert error.count('\n') == 1


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['qantize', 'x'], "unknown command 'qantize'. Did you mean 'quantize'? `repopt-timm --help`"),
        (
            ['train', '--device-modules', 'repopt_timm'],
            "unknown argument '--device-modules'. It is for timm's own train.py, and not needed here: leave it out.",
        ),
        (['scales', 'lits'], "unknown command 'lits'. Did you mean 'list'? `repopt-timm scales --help`"),
        (['export', 'x', '--onx', 'y'], "unknown argument '--onx'. Did you mean '--onnx'? `repopt-timm export --help`"),
        (['train', '--modle=x'], "unknown argument '--modle=x'. Did you mean '--model'? `repopt-timm train --help`"),
        (['save', 'x', 'y', '--precision', 'int4'], "unknown value of --precision 'int4'. Did you mean 'int8'?"),
        (['bench', 'zzz'], "unknown benchmark 'zzz'. Expected one of"),
        (['quantize'], 'the following arguments are required: model, --data, --out. `repopt-timm quantize --help`'),
        (['run', 'nowhere.py'], "There is no script 'nowhere.py'. Those of timm are in its repository"),
        (['run'], 'No script is named'),
    ],
)
def test_what_was_mistyped_gets_a_hint(arguments, message, capsys):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count('\n') == 1


@pytest.mark.parametrize('command', [*COMMANDS])
def test_each_command_has_a_help_that_calls_it_by_its_name(command, capsys):
    if command == 'run':
        assert main([command, '--help']) == 0
    else:
        with pytest.raises(SystemExit, match='0'):
            main([command, '--help'])
    assert capsys.readouterr().out.startswith(f'usage: repopt-timm {command} ')


@pytest.mark.parametrize(
    ('command', 'parts'),
    {
        'train': [
            *('number of epochs [300]', 'seed; epochs are seeded one by one, so that a resumed run repeats [42]'),
            *('weight decay [2e-05]', 'range of the random crop area [0.08 1]', 'pixel, rand, const) [pixel]'),
            *('folder of runs [output]', 'optimizer [repopt_sgd for a plain repopt_* model, else sgd]'),
            *(
                'differ, such as data_dir=... epochs=... [weight_decay=4e-05]',
                'train RepOpt-VGG, plain twins of other networks',
            ),
            "'implied' by the branches of pretrained weights",
        ],
        'quickstart': [
            'digits of scikit-learn, in about a minute on a CPU',
            'All arguments of repopt-timm train',
        ],
        'trial': [
            *('number of epochs [10]', 'a tenth of --epochs, 5 at most]', 'processes that load data [0]'),
            *('checkpoints to keep [1]', 'number of seeds; each arm is trained with each of them [3]'),
            'schedule, stepped on updates unless a config sets sched_on_updates: false (cosine, ',
        ],
        'quantize': [
            *('images to calibrate on [512]', 'in percent [99.99]', 'split to calibrate on [train]'),
            *('one scale per output channel, or one per tensor [per-channel]', 'ranges of activations [minmax]'),
            *('seed for choosing calibration images [0]', 'height and width of the images'),
        ],
        'export': ['18 or later [18]'],
        'evaluate': ['images at a time [32]', 'class map used in training', 'split to evaluate [validation]'],
        'compare-int8': ['batch sizes to time [1 32]', 'each measured [minmax entropy percentile]'],
        'save': ['number format of stored kernels [float32]'],
        'convert-checkpoint': ['timm name of the network, if the file does not state it'],
        'doctor': ['steps to train [20]', 'height and width [64]', 'target to train on this machine [repopt_vgg_a0]'],
        'predict': ['classes to show [5]'],
        'bench train': [
            *('rounds to time [5; on CUDA 20]', 'image sizes [64 224]', '[cuda if available, else cpu]'),
            '[repopt_vgg_b1; test_repopt_vgg with --quick]',
        ],
    }.items(),
)
def test_a_help_shows_what_an_argument_is_and_its_default(command, parts, help_of):
    text = help_of(command)
    for part in parts:
        assert part in text
    assert '(default' not in text and '[True]' not in text and '[False]' not in text


def test_the_help_of_a_trial_has_no_flag_that_could_change_nothing(help_of):
    assert '--sched-on-updates' not in help_of('trial')


@pytest.mark.parametrize('command', ['save', 'push', 'convert-checkpoint'])
def test_a_command_names_no_flag_that_it_lacks(command, help_of):
    assert '--architecture' not in help_of(command)


def test_what_the_output_cannot_encode_is_escaped(monkeypatch):
    output = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(output, 'cp1252'))
    row = {'name': '\u732b/a0', 'network': 'a0', 'dataset': None, 'license': None, 'where': 'cached'}
    monkeypatch.setattr('repopt_timm.scale_commands.known_scales', lambda: [row])
    assert main(['scales', 'list']) == 0
    assert rb'\u732b/a0' in output.getvalue()


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit, match='0'):
        main(['--version'])
    assert capsys.readouterr().out == f'repopt-timm {repopt_timm.__version__}\n'


def test_a_script_finds_models_optimizers_and_its_own_arguments(tmp_path, monkeypatch, capsys):
    (tmp_path / 'beside.py').write_text('FLAG = "--model"\n')
    (tmp_path / 'script.py').write_text(
        'import sys, timm, beside\n'
        'assert __name__ == "__main__" and sys.argv[1:] == [beside.FLAG, "repopt_resnet10t_hs", "--debug"]\n'
        'model = timm.create_model(sys.argv[2])\n'
        'print(timm.optim.get_optimizer_info("repoptsgd").name, hasattr(model, "scales_provenance"))\n'
        'sys.exit(3)\n'
    )
    monkeypatch.setattr(sys, 'argv', [*sys.argv])
    monkeypatch.setattr(sys, 'path', [*sys.path])
    with pytest.raises(SystemExit, match='3'):
        main(['run', str(tmp_path / 'script.py'), '--model', 'repopt_resnet10t_hs', '--debug'])
    assert capsys.readouterr().out == 'repoptsgd True\n'


def test_a_script_finds_the_twin_in_a_folder(tmp_path, monkeypatch, capsys):
    save_unknown_twin('test_convnext', tmp_path / 'mine')
    (tmp_path / 'script.py').write_text(
        'import sys, timm\nprint(timm.create_model(sys.argv[2].partition("=")[2], pretrained=True).num_classes)\n'
    )
    monkeypatch.setattr(sys, 'argv', [*sys.argv])
    monkeypatch.setattr(sys, 'path', [*sys.path])
    # Words that are no models are the script's.
    capsys.readouterr()
    assert main(['run', str(tmp_path / 'script.py'), 'a/b', f'--model=local-dir:{tmp_path / "mine"}', 'x:y']) == 0
    assert capsys.readouterr().out == '3\n'


def test_an_error_of_a_script_keeps_its_traceback(tmp_path, monkeypatch, capsys):
    (tmp_path / 'script.py').write_text('raise ValueError("bad")\n')
    monkeypatch.setattr(sys, 'argv', [*sys.argv])
    monkeypatch.setattr(sys, 'path', [*sys.path])
    with pytest.raises(SystemExit, match='1'):
        main(['run', str(tmp_path / 'script.py')])
    assert re.search(r'script\.py", line 1.*ValueError: bad', capsys.readouterr().err, re.DOTALL)


@pytest.mark.slow
def test_help_waits_for_little_but_timm():
    code = (
        'import sys, timm\nbefore = set(sys.modules)\nfrom repopt_timm.cli import main\n'
        'try:\n    main(["--help"])\nexcept SystemExit:\n    print("", *set(sys.modules) - before, sep="\\n")'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.partition('COMMAND')[2].split('\n'))
    assert 'repopt_timm.cli' in loaded
    assert not any(name.split('.')[1:2] in (['bench'], ['deploy'], ['train'], ['scale_commands']) for name in loaded)
    packages = {name.partition('.')[0] for name in loaded if name.replace('.', '').isidentifier()}
    # No ONNX, matplotlib or data sets.
    assert packages - sys.stdlib_module_names == {'repopt_timm', 'timm', 'huggingface_hub'}


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ('scales plot {file} {tmp}/picture', "picture' does not end in the suffix of a picture, such as picture.png"),
        ('scales plot {file} {tmp}/picture.docx', 'does not end in the suffix of a picture'),
        ('scales plot {file} {tmp}/pipe.png', "pipe.png' cannot be written: it is a device or a pipe"),
        ('scales extract {file} {file}', 'it is the input itself'),
        ('scales extract {file} {tmp}/device.safetensors', 'it is a device or a pipe'),
        ('scales extract {file} {file}/folder', 'is not a folder'),
        ('scales extract hf-hub:nobody/nothing {tmp}/device.safetensors', 'it is a device or a pipe'),
        ('save nowhere.pth {file}', 'is not a folder'),
        ('save {tmp}/model.safetensors {tmp}', "model.safetensors' cannot be written: it is the input itself"),
        ('convert-checkpoint nowhere.pth --out {file}', 'is not a folder'),
        ('bench memory --quick --plot {tmp}/picture', 'does not end in the suffix of a picture'),
        ('bench memory --quick --json {tmp}/pipe.png', 'it is a device or a pipe'),
    ],
)
def test_what_cannot_be_written_is_said_before_the_work_and_leaves_no_file(arguments, message, tmp_path, capsys):
    file = tmp_path / 'scales.safetensors'
    random_scales().save(file)
    os.mkfifo(tmp_path / 'pipe.png')
    (tmp_path / 'device.safetensors').symlink_to(os.devnull)
    (tmp_path / 'model.safetensors').touch()
    before = sorted(tmp_path.iterdir())
    assert main(arguments.format(tmp=tmp_path, file=file).split()) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count('\n') == 1
    assert sorted(tmp_path.iterdir()) == before
