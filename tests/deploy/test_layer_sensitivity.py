from repopt_timm.deploy import QuantizationOptions, layer_sensitivity, quantize_onnx
from repopt_timm.deploy.layer_sensitivity import sensitivity_table
from repopt_timm.deploy.onnx_graph import layers_of


def test_the_layer_that_int8_breaks_is_first(damaged, images):
    done = quantize_onnx(damaged, images, QuantizationOptions(images=20, weights='per-tensor'))
    ranking = layer_sensitivity(done)
    first, *others = ranking['layers']
    assert first['layer'] == 'stages.1.1.conv' and first['drop'] > 20
    assert {row['layer'] for row in ranking['layers']} == set(layers_of(done.model))
    assert all(row['kl'] < first['kl'] / 10 for row in others)
    assert (ranking['images'], ranking['labelled']) == (20, True) and ranking['int8']['drop'] > 20
    lines = sensitivity_table(ranking, 3).splitlines()
    assert [line.split()[1] for line in lines[2:4]] == ['all', 'stages.1.1.conv'] and len(lines) == 6


def test_without_labels_logits_are_compared(damaged, images):
    options = QuantizationOptions(images=10, weights='per-tensor', exclude=('head.fc',))
    ranking = layer_sensitivity(quantize_onnx(damaged, images / 'train' / 'grey', options))
    layers = [row['layer'] for row in ranking['layers']]
    assert layers[0] == 'stages.1.1.conv' and 'head.fc' not in layers
    assert not ranking['labelled'] and 'drop' not in ranking['layers'][0]
