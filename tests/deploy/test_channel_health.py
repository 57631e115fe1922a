from torch import nn

from repopt_timm.deploy.channel_health import still_channels


def test_channels_that_hardly_changed_in_training_are_counted_beside_others():
    norms = nn.ModuleDict({name: nn.BatchNorm2d(4) for name in ('some', 'all small', 'healthy')})
    norms['some'].running_var[:2] = 1e-9
    norms['all small'].running_var[:] = 1e-9
    norms['healthy'].running_var[0] = 1e-4
    assert still_channels(norms) == {'some': 2}
