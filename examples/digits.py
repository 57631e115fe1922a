"""A first look at the method, cell by cell: search scales, train with them, look at the result, deploy in INT8.

Handwritten digits of scikit-learn, a few minutes on a CPU. Needs `pip install 'repopt-timm[deploy]'`. It runs as a
script, and cell by cell in editors that know `# %%`.
"""

# %% The digits as a folder of images: digits/train/<class>/ and digits/validation/<class>/.
from pathlib import Path

import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.functional import pil_to_tensor

import repopt_timm
from repopt_timm.deploy import evaluate, quantize_onnx, save_onnx
from repopt_timm.plot import plot_curves, plot_scales

out = Path('digits')
pixels, labels = load_digits(return_X_y=True)
images = []
for index, (row, label) in enumerate(zip(pixels.reshape(-1, 8, 8), labels)):
    folder = out / ('validation' if index % 4 == 0 else 'train') / str(label)
    folder.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray((row * 255 / 16).astype('uint8')).resize((16, 16), Image.Resampling.BICUBIC)
    image.save(folder / f'{index}.png')
    images.append(pil_to_tensor(image))

# %% The same images as tensors, and a loop of a few lines.
numbers = {'num_classes': 10, 'in_chans': 1, 'depths': (1, 2, 2), 'widths': (16, 16, 32, 64), 'strides': (1, 2, 2, 1)}
held_out = torch.arange(len(labels)) % 4 == 0
images = (torch.stack(images) / 255 - 0.5) / 0.25
labels = torch.tensor(labels)
loader = DataLoader(TensorDataset(images[~held_out], labels[~held_out]), batch_size=64, shuffle=True)


def train(model, optimizer, epochs=8):
    """Returns the loss and the accuracy on held-out images of each epoch."""
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * len(loader))
    rows = []
    for epoch in range(epochs):
        model.train()
        losses = []
        for batch, targets in loader:
            loss = torch.nn.functional.cross_entropy(model(batch), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        with torch.inference_mode():
            correct = model.eval()(images[held_out]).argmax(1) == labels[held_out]
        top1 = 100 * correct.float().mean().item()
        rows.append({'epoch': epoch, 'train_loss': sum(losses) / len(losses), 'eval_top1': top1})
    return rows


# %% Hyper-Search: branches with trainable scales, and an ordinary optimizer.
torch.manual_seed(0)
search = timm.create_model('repopt_vgg_hs', **numbers)
histories = {'search': train(search, torch.optim.SGD(search.parameters(), 0.1, 0.9, weight_decay=4e-5, nesterov=True))}
scales = repopt_timm.Scales.from_model(search)
scales.save(out / 'scales.safetensors')

# %% Target: the plain network, started by the Rule of Initialization and trained with Grad Mults.
model = timm.create_model('repopt_vgg', scales=scales, **numbers)
optimizer = timm.optim.create_optimizer_v2(model, 'repopt_sgd', lr=0.1, weight_decay=4e-5)
histories['target'] = train(model, optimizer)
print({name: f'{rows[-1]["eval_top1"]:.2f} %' for name, rows in histories.items()})
plot_curves(histories, out / 'curves.png')
plot_scales(scales, out / 'scales.png', scales.title)

# %% The model as a folder of timm's format, its confusion matrix, and INT8.
model.pretrained_cfg |= {
    **{'input_size': (1, 16, 16), 'mean': (0.5,), 'std': (0.25,), 'crop_pct': 1.0, 'interpolation': 'bicubic'},
    'label_names': [str(digit) for digit in range(10)],
}
repopt_timm.save_pretrained(model, out / 'model')
done = quantize_onnx(out / 'model', out)
save_onnx(done.quantized, out / 'int8.onnx')
for source in (out / 'model', out / 'int8.onnx'):
    result = evaluate(source, out, out=out / f'classes-{source.stem}')
    print(f'{source}: {result["top1"]:.2f} %')
