from types import SimpleNamespace

import pytest

from repopt_timm.datasets import class_names, count_classes


@pytest.mark.parametrize(
    ('told', 'count', 'names'),
    [
        ({'classes': ['cat', 'dog']}, 2, ['cat', 'dog']),
        ({'class_to_idx': {'dog': 0, 'cat': 1}}, 2, ['dog', 'cat']),
        # As torchvision's ImageNet: several names for one class.
        ({'class_to_idx': {'cat': 0, 'kitten': 0, 'dog': 1}, 'classes': [('cat', 'kitten'), ('dog',)]}, 2, []),
        ({'class_to_idx': {'cat': 0, 'dog': 5}}, 6, []),
        ({}, None, []),
    ],
)
def test_classes_are_counted_by_number_and_named_where_each_has_one_name(told, count, names):
    for dataset in (SimpleNamespace(**told), SimpleNamespace(reader=SimpleNamespace(**told))):
        assert count_classes(dataset) == count
        assert class_names(dataset) == names
