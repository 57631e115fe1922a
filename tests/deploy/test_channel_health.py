import numpy as np
from torch import nn

from repopt_timm.deploy.channel_health import constant_inputs, kernel_outliers, still_channels


def test_channels_that_never_change_are_found_with_their_value(broken_by_int8):
    done = broken_by_int8
    constants = constant_inputs(done.model, done.images, done.indices)['stages.1.1.conv']
    assert constants[5] == 0
    assert np.isnan(constants[[4, 6]]).all()
    assert done.dead['stages.1.1.conv'] == (~np.isnan(constants)).sum()


def test_weights_that_are_far_too_large_are_counted(exported, broken_by_int8):
    assert kernel_outliers(exported) == {}
    assert kernel_outliers(broken_by_int8.model) == {'stages.1.1.conv': 1}


def test_channels_that_hardly_changed_in_training_are_counted_beside_others():
    norms = nn.ModuleDict({name: nn.BatchNorm2d(4) for name in ('some', 'all small', 'healthy')})
    norms['some'].running_var[:2] = 1e-9
    norms['all small'].running_var[:] = 1e-9
    norms['healthy'].running_var[0] = 1e-4
    assert still_channels(norms) == {'some': 2}
