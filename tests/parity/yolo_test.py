"""The PyTorch form that detection is timed beside: the authors' loss, a network as large."""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention_jax
from tests import helpers

torch = pytest.importorskip('torch', reason="needs PyTorch: pip install 'attention_jax[parity]'")
FORM = pathlib.Path(__file__).resolve().parents[2] / 'benchmarks' / 'torch_yolo.py'


@pytest.fixture(scope='module')
def form():
    spec = importlib.util.spec_from_file_location('torch_yolo', FORM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize('name', ['loss_voc', 'loss_few'])
def test_loss_is_the_authors(form, name):
    arrays = dict(np.load(helpers.REFERENCE / 'detection' / f'{name}.npz'))
    meta = json.loads(str(arrays['meta']))
    outputs = [torch.from_numpy(arrays[f'output{i}']).requires_grad_() for i in (0, 1)]
    targets = [
        torch.from_numpy(np.concatenate([b, c[:, None]], 1)[c >= 0])
        for b, c in zip(arrays['boxes'], arrays['classes'], strict=True)
    ]
    loss = form.loss(
        outputs,
        targets,
        image_size=(meta['image_size'],) * 2,
        anchors=meta['anchors'],
        masks=meta['masks'],
    )
    np.testing.assert_allclose(loss.item(), arrays['loss'].sum(), rtol=1e-9)
    loss.backward()
    for i, output in enumerate(outputs):
        np.testing.assert_allclose(output.grad.numpy(), arrays[f'grad{i}'], atol=1e-10)


def test_the_network_has_as_many_parameters_and_the_same_outputs_in_shape(form):
    network = form.YOLOv4Tiny(20)
    assert sum(p.numel() for p in network.parameters()) == 5_918_006
    with torch.no_grad():
        shapes = [tuple(o.shape) for o in network.eval()(torch.zeros(1, 3, 64, 96))]
    model = attention_jax.create_model('yolov4_tiny_voc_phi0')
    ours = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x)[0], jnp.zeros((1, 64, 96, 3))
    )
    assert [(s[0], *s[2:], s[1]) for s in shapes] == [o.shape for o in ours]
