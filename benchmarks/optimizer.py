"""A step of RepOptSGD and RepOptAdamW against those of torch's fused optimizers.

    python benchmarks/optimizer.py --model repopt_vgg_b1

The gradients are set anew before each step, which multiplies them in place.
"""

from typing import Any

import timm
import torch
from turns import parse, time_table

from repopt_timm import Scales
from repopt_timm.optim import RepOptAdamW, RepOptSGD
from repopt_timm.reparam import make_grad_mults

RULES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    'sgd': (torch.optim.SGD, RepOptSGD, {'lr': 1e-4, 'momentum': 0.9, 'nesterov': True, 'weight_decay': 4e-5}),
    'adamw': (torch.optim.AdamW, RepOptAdamW, {'lr': 1e-5, 'weight_decay': 1e-2}),
}
"""Name of an update rule to torch's optimizer, the RepOptimizer, and their settings."""


def main() -> None:
    args = parse(__doc__)
    for name in args.model:
        model = timm.create_model(name).to(args.device)
        parameters = list(model.parameters())
        gradients = [1e-3 * torch.randn_like(parameter) for parameter in parameters]

        def refresh(parameters: list[Any] = parameters, gradients: list[Any] = gradients) -> None:
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient.clone()

        for rule, (plain, repopt, settings) in RULES.items():
            mults = make_grad_mults(model, Scales.initial(model), update_rule=rule)
            optimizers = {
                f'{plain.__name__}(fused=True)': plain(parameters, fused=True, **settings),
                f'{repopt.__name__}(fused=True)': repopt(parameters, grad_mults=mults, fused=True, **settings),
                f'{repopt.__name__}()': repopt(parameters, grad_mults=mults, **settings),
            }
            steps = {key: optimizer.step for key, optimizer in optimizers.items()}
            print(time_table(f'step of {name}', steps, args, before=refresh))


if __name__ == '__main__':
    main()
