import pytest
import torch

from repopt_timm.train.validation import check_layout


@pytest.mark.parametrize('stride', [2, (2, 2)])
def test_a_layout_in_which_torch_corrupts_memory_is_refused_however_the_stride_is_written(stride):
    conv = torch.nn.Conv2d(3, 8, 1, stride=2)
    conv.stride = stride
    with pytest.raises(ValueError, match="corrupts memory on a CPU as it trains '0'"):
        check_layout(torch.nn.Sequential(conv), (3, 96, 96), torch.device('cpu'))
