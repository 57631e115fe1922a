"""A trial that fine-tunes a trained multi-branch network, with its branches or merged; see finetune.sh.

    python docs/evidence/finetune.py PRETRAINED IMAGES MERGED WORDS...

WORDS are the words of `repopt-timm trial`. Arms with branches start from the weights of PRETRAINED, a name for
`timm.create_model`. Arms of the plain network start from the same weights merged, whose BatchNorms are measured on the
folder IMAGES; `repopt` takes the scales that the branches imply. The merged network is kept in the folder MERGED.
"""

import sys
from dataclasses import replace
from pathlib import Path

from repopt_timm.cli import main as repopt_timm
from repopt_timm.trial.trial_command import command_of
from repopt_timm.trial.trial_command import main as run_trial
from repopt_timm.trial.trial_folder import Run, Trial


def main() -> None:
    pretrained, images, merged, *words = sys.argv[1:]
    # The card is written last.
    if not Path(merged, 'README.md').exists():
        convert = ['convert-checkpoint', pretrained, '--data', images, '--scales', 'implied', '--out', merged]
        if code := repopt_timm(convert):
            sys.exit(code)

    def command(run: Run, trial: Trial) -> list[str]:
        plain = run.arguments['model'] == trial.model
        start = {'model': f'local-dir:{merged}' if plain else pretrained, 'pretrained': True, 'scales': None}
        return command_of(replace(run, arguments={**run.arguments, **start}), trial)

    run_trial(words, command)


if __name__ == '__main__':
    main()
