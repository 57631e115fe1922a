"""A detector with one of the backbones: the scales sit on its convolutions, so the optimizer finds them there.

It learns to box a bright square on noise: FCOS of torchvision with feature maps of strides 8, 16 and 32.
"""

import timm
import torch
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork

import repopt_timm  # noqa: F401


class Pyramid(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.body = timm.create_model(name, features_only=True, out_indices=(-3, -2, -1), scales='initial')
        self.pyramid = FeaturePyramidNetwork(self.body.feature_info.channels(), out_channels=32)
        self.out_channels = 32

    def forward(self, images):
        return self.pyramid({str(level): each for level, each in enumerate(self.body(images))})


def squares(count: int):
    images, targets = 0.1 * torch.rand(count, 3, 64, 64), []
    for image in images:
        left, top = torch.randint(0, 40, (2,)).tolist()
        image[:, top : top + 20, left : left + 20] += 0.8
        box = torch.tensor([[left, top, left + 20, top + 20]], dtype=torch.float)
        targets.append({'boxes': box, 'labels': torch.ones(1, dtype=torch.long)})
    return list(images), targets


torch.manual_seed(0)
backbone = Pyramid('test_repopt_vgg')
strides = backbone.body.feature_info.reduction()
anchors = AnchorGenerator(tuple((2 * stride,) for stride in strides), ((1.0,),) * len(strides))
detector = FCOS(backbone, num_classes=2, anchor_generator=anchors, min_size=64, max_size=64)
optimizer = timm.optim.create_optimizer_v2(detector, 'repopt_sgd', lr=0.02, weight_decay=1e-4)
for step in range(1, 41):
    loss = sum(detector(*squares(8)).values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(f'step {step}: loss {loss.item():.2f}')
