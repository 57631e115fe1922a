"""Accelerate: a loop of one's own. Needs `pip install accelerate`."""

import timm
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import repopt_timm  # noqa: F401

data = TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 5)
accelerator = Accelerator(cpu=True)
model = timm.create_model('test_repopt_vgg', scales='initial', num_classes=5)
optimizer = timm.optim.create_optimizer_v2(model, 'repopt_sgd', lr=0.05, weight_decay=4e-5)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=4))
# FSDP2 exchanges the parameters of a finished optimizer. Make the Grad Mults anew there:
#     optimizer.optimizer.take_grad_mults(repopt_timm.make_grad_mults(model))
for images, labels in loader:
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
