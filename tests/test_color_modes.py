import pytest

from repopt_timm.color_modes import evaluated_mode, note_color_mode, noted_color_mode
from repopt_timm.weights_origin import note_merged, origin_of

from .helpers import tiny_model


@pytest.mark.parametrize(
    ('channels', 'stated', 'mode'),
    [(1, None, 'L'), (3, None, 'RGB'), (4, None, 'RGBA'), (3, 'HSV', 'HSV'), (4, 'CMYK', 'CMYK'), (2, 'LA', 'LA')],
)
def test_a_mode_is_the_one_stated_or_that_of_the_channels(channels, stated, mode):
    assert evaluated_mode({'input_size': (channels, 8, 8), 'input_img_mode': stated}) == mode


@pytest.mark.parametrize(
    ('channels', 'stated', 'message'),
    [
        (1, 'F', "in the mode 'F', expected one of L, LA, RGB, .*: training and evaluation read other values"),
        (1, 'nonsense', "in the mode 'nonsense', expected one of"),
        (4, 'HSV', "in the mode 'HSV', which have 3 channels, but the input size has 4"),
        (5, None, 'takes 5 channels, expected 1 to 4'),
    ],
)
def test_a_mode_that_evaluation_cannot_read_as_training_did_is_refused(channels, stated, message):
    with pytest.raises(ValueError, match=message):
        evaluated_mode({'input_size': (channels, 8, 8), 'input_img_mode': stated})


def test_a_model_notes_one_mode_beside_what_else_is_known_of_it():
    model = tiny_model()
    note_merged(model, 'timm/other')
    for mode in ('HSV', 'LAB'):
        note_color_mode(model, mode)
        assert noted_color_mode(model) == mode
        assert len(origin_of(model)['notes']) == 2
    # What three channels are anyway.
    note_color_mode(model, 'RGB')
    assert noted_color_mode(model) is None
    assert origin_of(model)['notes'] == ['merged from timm/other']
