"""Transformers' Trainer with an optimizer that multiplies gradients. Needs `pip install transformers accelerate`."""

import timm
import torch
from transformers import Trainer, TrainingArguments

import repopt_timm  # noqa: F401


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {'pixel_values': torch.full((3, 32, 32), index / 8), 'labels': index % 5}


class Classifier(torch.nn.Module):
    def __init__(self, name: str, num_classes: int):
        super().__init__()
        self.model = timm.create_model(name, scales='initial', num_classes=num_classes)

    def forward(self, pixel_values, labels):
        logits = self.model(pixel_values)
        return {'loss': torch.nn.functional.cross_entropy(logits, labels), 'logits': logits}


model = Classifier('test_repopt_vgg', num_classes=5)
optimizer = timm.optim.create_optimizer_v2(model, 'repopt_sgd', lr=0.05, weight_decay=4e-5)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2)
# Without max_grad_norm=0 it clips gradients to the plain norm 1.
arguments = TrainingArguments('out', max_steps=2, use_cpu=True, report_to=[], save_strategy='no', max_grad_norm=0)
Trainer(model, arguments, train_dataset=Images(), optimizers=(optimizer, schedule)).train()
