"""A Hyper-Search step against a step of its plain network.

python benchmarks/search.py --model repopt_vgg_b1
"""

import timm
from turns import dtype, images_and_labels, memory_format, parse, time_table

from repopt_timm.names import ModelName
from repopt_timm.trial.networks import activation_bytes, training_step


def main() -> None:
    args = parse(__doc__)
    images, labels = images_and_labels(args)
    for name in args.model:
        searched = ModelName.parse(name).of_kind('hs')
        steps, saved = {}, {}
        for key, opt in ((name, 'repopt_sgd'), (searched, 'sgd')):
            model = timm.create_model(key, **({'scales': 'initial'} if key == name else {}))
            model.to(args.device).to(memory_format=memory_format(args))
            steps[key] = training_step(model, images, labels, dtype(args), opt)
            saved[key] = f'{activation_bytes(model, images, labels, dtype(args)) / 1e6:.2f} MB'
        columns = {'activations per image': saved}
        print(time_table(f'training step, {args.img_size} px', steps, args, columns=columns))


if __name__ == '__main__':
    main()
