import timm
import torch

from repopt_timm.train.residual import residual_convs


def test_convolutions_on_one_of_two_paths_to_a_sum_lie_in_a_residual_block():
    model = timm.create_model('test_resnet').eval()
    blocks = [name for name, each in model.named_modules() if isinstance(each, torch.nn.Conv2d) and 'layer' in name]
    assert residual_convs(model, torch.randn(1, 3, 64, 64)) == blocks
    for plain in ('vgg11_bn', 'densenet121', 'test_repopt_vgg'):
        size = timm.get_pretrained_cfg_value(plain, 'input_size') or (3, 64, 64)
        with torch.device('meta'):
            assert not residual_convs(timm.create_model(plain).eval(), torch.randn(1, *size))
