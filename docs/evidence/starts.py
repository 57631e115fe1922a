"""A trial with RepOptSGD from initial kernels that the package does not offer.

    python docs/evidence/starts.py WORDS...

WORDS are the words of `repopt-timm trial`. Its `--scales NAME=SOURCE` make the arms, which start by their NAME:

* `own`: the Rule of Initialization, its k x k operators being the kernels that timm gives the plain network;
* `timm`: these kernels as they are, so that only the gradients are multiplied;
* `operators_003`, `operators_01`, `operators_03`: as in the paper, the k x k and 1x1 operators times 0.03, 0.1, 0.3 in
  the layers with an identity. Times 0 is the package's identity start, times 1 the paper's;
* any other name: as the scales say.
"""

import sys
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import save_file

from repopt_timm.reparam import make_branches, merge
from repopt_timm.reparam.branches import draw_operators
from repopt_timm.sources import load_scales
from repopt_timm.trial.networks import make_network
from repopt_timm.trial.trial_command import command_of, main
from repopt_timm.trial.trial_folder import Run, Trial

FACTORS = {'operators_003': 0.03, 'operators_01': 0.1, 'operators_03': 0.3}


@torch.no_grad()
def initial_weights(start: str, run: Run, trial: Trial) -> dict[str, torch.Tensor]:
    """Returns the state dict that a run starts from."""
    torch.manual_seed(run.arguments['seed'])
    model = make_network(trial)
    scales = load_scales(run.arguments['scales'], model)
    for name, vectors in scales.items() if start != 'timm' else ():
        conv: Any = model.get_submodule(name)
        branches = make_branches(scales.counts[name], conv)
        operators = draw_operators(branches, conv.weight, vectors)
        if start == 'own':
            operators['kxk'] = conv.weight
        elif 'identity' in operators:
            operators |= {each: FACTORS[start] * operators[each] for each in operators if each != 'identity'}
        conv.weight.copy_(merge(branches, operators, vectors, conv.weight.shape))
    return model.state_dict()


def command(run: Run, trial: Trial) -> list[str]:
    """Returns the command of a run, which starts from weights in its folder."""
    start = run.folder.parent.name
    if start in ('own', 'timm', *FACTORS):
        path = run.folder / 'initial.safetensors'
        save_file({name: each.contiguous() for name, each in initial_weights(start, run, trial).items()}, path)
        run = replace(run, arguments={**run.arguments, 'initial_checkpoint': str(path)})
    return command_of(run, trial)


if __name__ == '__main__':
    main(sys.argv[1:], command)
