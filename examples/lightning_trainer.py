"""PyTorch Lightning: a LightningModule whose optimizer multiplies gradients. Needs `pip install lightning`."""

import lightning
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

import repopt_timm


class Classifier(lightning.LightningModule):
    def __init__(self, name: str, num_classes: int):
        super().__init__()
        self.model = timm.create_model(name, scales='initial', num_classes=num_classes)

    def training_step(self, batch, index):
        images, labels = batch
        return torch.nn.functional.cross_entropy(self.model(images), labels)

    def configure_optimizers(self):
        return timm.optim.create_optimizer_v2(self.model, 'repopt_sgd', lr=0.05, weight_decay=4e-5)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        # Trainer(gradient_clip_val=1.0) would measure the plain norm. This is the norm of the CSLA network.
        if gradient_clip_val:
            repopt_timm.clip_grad_norm_(self.parameters(), gradient_clip_val, optimizer.grad_mults)


data = TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 5)
trainer = lightning.Trainer(
    max_epochs=1, accelerator='cpu', logger=False, enable_checkpointing=False, gradient_clip_val=1.0
)
trainer.fit(Classifier('test_repopt_vgg', num_classes=5), DataLoader(data, batch_size=4))
