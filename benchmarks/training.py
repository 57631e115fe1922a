"""A training step, and what it saves for the backward pass, of a network with branches against its plain twin.

python benchmarks/training.py --model repopt_mobileone_s0 repopt_vgg_a0 repopt_vgg_b1
"""

import timm
from turns import dtype, images_and_labels, memory_format, parse, time_table

from repopt_timm.model_size import count_parameters
from repopt_timm.names import ModelName
from repopt_timm.trial.networks import activation_bytes, training_step


def main() -> None:
    args = parse(__doc__)
    images, labels = images_and_labels(args)
    for name in args.model:
        branches = ModelName.parse(name).of_kind('branches')
        models = {
            name: timm.create_model(name, scales='initial'),
            f'{name}, grad checkpointing': timm.create_model(name, scales='initial'),
            branches: timm.create_model(branches),
        }
        models[f'{name}, grad checkpointing'].set_grad_checkpointing()
        steps, columns = {}, {'activations per image': {}, 'parameters': {}}
        for key, model in models.items():
            model.to(args.device).to(memory_format=memory_format(args))
            steps[key] = training_step(model, images, labels, dtype(args), 'sgd' if key == branches else 'repopt_sgd')
            columns['activations per image'][key] = (
                f'{activation_bytes(model, images, labels, dtype(args)) / 1e6:.2f} MB'
            )
            columns['parameters'][key] = f'{count_parameters(model) / 1e6:.2f} M'
        print(time_table(f'training step, {args.img_size} px', steps, args, columns=columns))


if __name__ == '__main__':
    main()
