import io
import os
import re
import subprocess
import sys

import pytest

from repopt_timm import __version__
from repopt_timm.cli import main
from repopt_timm.commands import COMMANDS

from .helpers import assert_refused, random_scales, save_unknown_twin


@pytest.mark.parametrize(
    ('arguments', 'named'),
    [
        ('scales show hf-hub:a/b@', 'revision'),
        ('scales show initial', '--arch'),
        ('convert-checkpoint x.pth', '--out'),
        ('qantize x', "unknown command 'qantize'. Did you mean 'quantize'?"),
        ('scales lits', "unknown command 'lits'. Did you mean 'list'?"),
        ('export x --onx y', "unknown argument '--onx'. Did you mean '--onnx'?"),
        ('save x y --precision int4', "unknown value of --precision 'int4'. Did you mean 'int8'?"),
        ('quantize', 'arguments are required: model, --data, --out'),
        ('run', 'expected one as in repopt-timm run validate.py'),
        ('scales plot {file} {tmp}/picture', "picture' does not end in the suffix of a picture"),
        ('scales plot {file} {tmp}/pipe.png', "pipe.png' cannot be written: it is a device or a pipe"),
        ('scales extract {file} {file}', 'it is the input itself'),
        ('scales extract {file} {tmp}/device.safetensors', 'it is a device or a pipe'),
        ('save nowhere.pth {file}', 'is not a folder'),
        ('save {tmp}/model.safetensors {tmp}', "model.safetensors' cannot be written: it is the input itself"),
        ('convert-checkpoint nowhere.pth --out {file}', 'is not a folder'),
        ('save nowhere.pth {tmp}/new --class-map map.txt', '--data'),
        ('scales show initial --architecture nosuch', "--architecture is 'nosuch'"),
    ],
)
def test_an_error_is_one_clear_line_before_the_work_and_leaves_no_file(arguments, named, tmp_path, capsys):
    file = tmp_path / 'scales.safetensors'
    random_scales().save(file)
    os.mkfifo(tmp_path / 'pipe.png')
    (tmp_path / 'device.safetensors').symlink_to(os.devnull)
    (tmp_path / 'model.safetensors').touch()
    before = sorted(tmp_path.iterdir())
    assert_refused(arguments.format(tmp=tmp_path, file=file).split(), named, capsys)
    assert sorted(tmp_path.iterdir()) == before


# Parts of the help of a command.
HELPS = {name: [] for name in COMMANDS} | {
    'train': ['number of epochs [300]', 'weight decay [2e-05]', 'crop area [0.08 1]', 'model, else sgd]'],
    'quickstart': ['digits of scikit-learn, in one or two minutes on a CPU'],
    'quantize': ['images to calibrate on [512]', 'split to calibrate on [train]'],
    'predict': ['classes to show [5]'],
}


@pytest.mark.parametrize(('command', 'parts'), HELPS.items())
def test_each_command_has_a_help_that_calls_it_by_its_name_and_shows_defaults(command, parts, monkeypatch, capsys):
    # Words with a hyphen are broken at the end of a line.
    monkeypatch.setenv('COLUMNS', '1000')
    if command == 'run':
        assert main([command, '--help']) == 0
    else:
        with pytest.raises(SystemExit, match='0'):
            main([command, '--help'])
    text = ' '.join(capsys.readouterr().out.split())
    assert text.startswith(f'usage: repopt-timm {command} ') and all(part in text for part in parts)
    assert not any(word in text for word in ('(default', '[True]', '[False]'))


def test_debug_shows_the_error_itself():
    with pytest.raises(FileNotFoundError):
        main(['scales', 'show', 'nowhere', '--debug'])


def test_what_the_output_cannot_encode_is_escaped(monkeypatch):
    output = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(output, 'cp1252'))
    row = {'name': '\u732b/a0', 'network': 'a0', 'dataset': None, 'license': None, 'where': 'cached'}
    monkeypatch.setattr('repopt_timm.publish_commands.known_scales', lambda: [row])
    assert main(['scales', 'list']) == 0
    assert rb'\u732b/a0' in output.getvalue()


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit, match='0'):
        main(['--version'])
    assert capsys.readouterr().out == f'repopt-timm {__version__}\n'


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Writes a script, and leaves this process its own arguments and paths."""
    monkeypatch.setattr(sys, 'argv', [*sys.argv])
    monkeypatch.setattr(sys, 'path', [*sys.path])
    path = tmp_path / 'script.py'
    return lambda text: path.write_text(text) and str(path)


def test_a_script_finds_models_optimizers_and_its_own_arguments(script, tmp_path, capsys):
    save_unknown_twin('test_convnext', tmp_path / 'mine')
    (tmp_path / 'beside.py').write_text('FLAG = "--debug"\n')
    path = script(
        'import sys, timm, beside\n'
        'assert __name__ == "__main__" and sys.argv[-1] == beside.FLAG\n'
        'print(hasattr(timm.create_model(sys.argv[1]), "scales_provenance"))\n'
        'print(timm.create_model(sys.argv[2].partition("=")[2], pretrained=True).num_classes)\n'
        'print(timm.optim.get_optimizer_info("repoptsgd").name)\n'
        'sys.exit(3)\n'
    )
    capsys.readouterr()
    # Words that are no models are the script's.
    words = ['repopt_resnet10t_hs', f'--model=local-dir:{tmp_path / "mine"}', 'a/b', 'x:y', '--debug']
    with pytest.raises(SystemExit, match='3'):
        main(['run', path, *words])
    assert capsys.readouterr().out == 'True\n3\nrepoptsgd\n'


def test_an_error_of_a_script_keeps_its_traceback(script, capsys):
    with pytest.raises(SystemExit, match='1'):
        main(['run', script('raise ValueError("bad")\n')])
    assert re.search(r'script\.py", line 1.*ValueError: bad', capsys.readouterr().err, re.DOTALL)


def test_the_help_of_all_commands_waits_for_none_of_them():
    code = (
        'import sys\nfrom repopt_timm.cli import main\n'
        'try:\n    main(["--help"])\nexcept SystemExit:\n    print("", *sys.modules, sep="\\n")'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split('\n'))
    rooms = {name.split('.')[1] for name in loaded if name.startswith('repopt_timm.')}
    assert not rooms & {'deploy', 'train', 'trial', 'publish_commands'}
    assert not loaded & {'onnx', 'matplotlib', 'datasets', 'sklearn', 'pandas', 'scipy.stats'}
