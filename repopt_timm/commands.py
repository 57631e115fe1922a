"""The commands of `repopt-timm`: what each does in a line, and the module that it is in.

A module is imported when its command runs, so that `--help` does not wait for what others need. It has a function
`main`, which gets the arguments, or `add_commands`, which gets what `ArgumentParser.add_subparsers` returned.
"""

from typing import NamedTuple

PROGRAM = 'repopt-timm'


class Command(NamedTuple):
    """A command: one line of help, and its module in this package."""

    summary: str
    module: str


_TRAIN, _PUBLISH, _DEPLOY = '.train.command', '.publish_commands', '.deploy.deploy_commands'

COMMANDS = {
    'train': Command('search scales or train a model', _TRAIN),
    'quickstart': Command('train on handwritten digits, in one or two minutes', _TRAIN),
    'trial': Command('train a network in several ways, and say whether they differ', '.trial.trial_command'),
    'scales': Command('list, show, write, draw and share scales', _PUBLISH),
    'save': Command('write a checkpoint as a folder in the format of the Hub', _PUBLISH),
    'push': Command('publish a checkpoint as a model on the Hub, with its scales in the card', _PUBLISH),
    'convert-checkpoint': Command("convert the reference repository's weights, and merge trained branches", _PUBLISH),
    'export': Command('write a trained model as ONNX', _DEPLOY),
    'quantize': Command('write a trained model as INT8 ONNX', _DEPLOY),
    'evaluate': Command('measure accuracy, latency, throughput and size of a model', _DEPLOY),
    'compare-int8': Command('measure models in float32 and in all kinds of INT8, in one table', _DEPLOY),
    'predict': Command('classify images, with the names of the classes where they are known', _DEPLOY),
    'doctor': Command('check that this machine trains a model right', '.doctor'),
    'run': Command("run a script, such as timm's validate.py, that finds these models and optimizers", '.script'),
}
