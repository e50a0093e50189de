"""Weights from PyTorch's names, our own files, the hub and runs; what differs, what is wrong."""

import json
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image
from safetensors import SafetensorError

import attention_jax
from attention_jax import data, load_pretrained
from attention_jax.interop import cards, files, matching, pretrained, torch
from attention_jax.interop.preprocessing import Preprocessing
from attention_jax.models.registry import model_entry
from attention_jax.tasks.classification import transforms
from attention_jax.tasks.classification.source import Description, Source, open_split
from tests import helpers

NAME = 'tiny_resnet'
SMALL = ('tiny_resnet', 'cifar_resnet20')
TIMM = {
    'architecture': NAME,
    'pretrained_cfg': {
        'mean': [0.5, 0.5, 0.5],
        'std': [0.2, 0.2, 0.2],
        'crop_pct': 0.95,
        'interpolation': 'bicubic',
        'input_size': [3, 40, 48],
        'license': 'apache-2.0',
    },
}


def variables_of(channels=3, dtype=np.float32, **arguments):
    module = attention_jax.create_model(NAME, **arguments)
    x = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
    return helpers.random_variables(module, x, dtype=dtype)


def write_foreign(path, *, extra=None, prefix='', without=(), **arguments):
    """A file under PyTorch's names, and the variables in it."""
    variables = variables_of(**arguments)
    arguments.pop('channels', None)
    state = torch.to_state_dict(NAME, variables, **arguments) | (extra or {})
    state = {f'{prefix}{k}': v for k, v in state.items() if k not in without}
    files.write(path, state, {'format': 'pt'})
    return variables


def assert_same(got, want, but=()):
    """Equal bit for bit, types included, up to the paths `but`."""
    got, want = (traverse_util.flatten_dict(tree, sep='/') for tree in (got, want))
    assert not set(want) - set(got) - set(but)
    for path, value in got.items():
        if path not in but:
            assert value.dtype == want[path].dtype
            np.testing.assert_array_equal(value, want[path], err_msg=path)


@pytest.mark.parametrize(
    'name',
    [
        n if n in SMALL else pytest.param(n, marks=pytest.mark.slow)
        for n in attention_jax.list_models()
    ],
)
def test_names_there_and_back_are_the_same_bits(name):
    entry = model_entry(name)
    module = entry.build()
    leaves = matching.network_shapes(entry, module, 3)
    random = np.random.default_rng(0)
    flat = {
        p: random.integers(0, 256, x.shape, np.uint8).astype(x.dtype) for p, x in leaves.items()
    }
    variables = traverse_util.unflatten_dict(flat, sep='/')
    _, back, report = torch.from_state_dict(name, torch.to_state_dict(name, variables))
    assert_same(back, variables)
    assert not report.ignored


@pytest.mark.parametrize('prefix', ['', 'module.', 'module.backbone.'])
def test_torch_names_from_safetensors(tmp_path, prefix):
    path = tmp_path / 'x.safetensors'
    tracked = {'bn1.num_batches_tracked': np.asarray(7)}
    variables = write_foreign(path, prefix=prefix, extra=tracked, num_classes=7)
    module, loaded, report = load_pretrained(NAME, path)
    assert module.num_classes == 7
    assert_same(loaded, variables)
    assert (report.new, report.dropped, report.faults) == ((), (), 0)
    x = jnp.ones((1, 32, 32, 3))
    assert jax.eval_shape(module.apply, loaded, x).shape == (1, 7)


HEAD = ('params/head/kernel', 'params/head/bias')
STEM = ('params/stem_conv1/kernel',)


@pytest.mark.parametrize(
    ('held', 'asked', 'new', 'dropped'),
    [
        ({}, {'num_classes': 3}, HEAD, ()),
        ({}, {'num_classes': 0}, (), HEAD),
        ({'num_classes': 0}, {'num_classes': 3}, HEAD, ()),
        ({}, {'channels': 1}, STEM, ()),
        ({'channels': 5}, {}, (), ()),
        ({'channels': 1, 'num_classes': 4}, {'channels': 3, 'num_classes': 6}, (*STEM, *HEAD), ()),
    ],
)
@pytest.mark.parametrize('form', ['torch', 'ours'])
def test_another_head_and_other_channels(tmp_path, form, held, asked, new, dropped):
    path = tmp_path / 'x.safetensors'
    if form == 'torch':
        variables = write_foreign(path, **held)
    else:
        variables = variables_of(**held)
        arguments = {k: v for k, v in held.items() if k != 'channels'}
        cards.save(path, NAME, variables, arguments=arguments)
    module, loaded, report = load_pretrained(NAME, path, **asked)
    assert sorted(report.new) == sorted(new)
    assert sorted(report.dropped) == sorted(dropped)
    assert_same(loaded, variables, but=(*new, *dropped))
    channels = asked.get('channels', held.get('channels', 3))
    logits = jax.eval_shape(module.apply, loaded, jnp.ones((1, 32, 32, channels)))
    assert logits.shape == (1, module.num_classes or 64)


def test_a_mechanism_is_added_and_is_new_by_its_seed(tmp_path):
    path = tmp_path / 'x.safetensors'
    variables = write_foreign(path)
    _, loaded, report = load_pretrained(NAME, path, attention='se', num_classes=3)
    assert len(report.new) == 3 * 4 + 2
    assert all('/attention/' in path or path in HEAD for path in report.new)
    assert_same(loaded, variables, but=report.new)
    kernel = loaded['params']['head']['kernel']
    assert kernel.shape == (64, 3)
    assert kernel.std() > 0
    other = load_pretrained(NAME, path, attention='se', num_classes=3, seed=1)[1]
    assert (other['params']['head']['kernel'] != kernel).any()
    cards.save(path, NAME, variables)  # of a file of ours the same
    assert_same(load_pretrained(NAME, path, attention='se', num_classes=3)[1], loaded)
    text = str(report)
    assert '14 new: ' in text
    assert 'and 4 more' in text


def test_a_mechanism_that_starts_as_the_identity_changes_nothing(tmp_path):
    path = tmp_path / 'x.safetensors'
    variables = write_foreign(path)
    arguments = {'attention': 'se', 'identity_init': True}
    module, loaded, report = load_pretrained(NAME, path, **arguments)
    assert sum(path.endswith('_alpha') for path in report.new) == 3
    x = helpers.array((1, 8, 8, 3), dtype=np.float32)
    plain = attention_jax.create_model(NAME)
    out = jax.jit(lambda v, x: module.apply(v, x))(loaded, x)
    helpers.assert_close(out, jax.jit(plain.apply)(variables, x), 1e-6)


# Detectors: heads of several outputs a class, and a backbone that comes alone.

YOLO = {'width': 0.125, 'num_classes': 4}
YOLO_HEADS = {f'params/head{s}/{leaf}' for s in (16, 32) for leaf in ('kernel', 'bias')}


def yolo_variables(name='yolov4_tiny', **arguments):
    module = attention_jax.create_model(name, **YOLO | arguments)
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return helpers.random_variables(module, x, dtype=np.float32)


@pytest.mark.parametrize('form', ['torch', 'ours'])
@pytest.mark.parametrize(
    ('held', 'asked', 'new'),
    [
        ({}, {}, set()),
        ({'masks': ((3, 4), (0, 1, 2))}, {'num_classes': 6}, YOLO_HEADS),
    ],
)
def test_detectors_of_other_classes(tmp_path, form, held, asked, new):
    path = tmp_path / 'x.safetensors'
    variables = yolo_variables(**held)
    if form == 'torch':
        state = torch.to_state_dict('yolov4_tiny', variables, **YOLO | held)
        files.write(path, state, {'format': 'pt'})
        arguments = {'width': 0.125} | held | asked
    else:
        cards.save(path, 'yolov4_tiny', variables, arguments=YOLO | held)
        arguments = asked | {'anchors': ((9, 9),) * 6, 'image_size': (64, 96)}
    module, loaded, report = load_pretrained('yolov4_tiny', path, **arguments)
    assert module.num_classes == asked.get('num_classes', 4)
    assert (set(report.new), report.dropped, report.faults) == (new, (), 0)
    assert_same(loaded, variables, but=new)


@pytest.mark.parametrize(
    ('name', 'asked', 'arrays'),
    [
        ('yolov4_tiny', {'attention': 'se', 'attention_args': {'reduction': 4}}, 4),
        ('yolov4_tiny_voc_phi1', {}, 2),
    ],
)
def test_a_detectors_mechanism_is_new(tmp_path, name, asked, arrays):
    path = tmp_path / 'x.safetensors'
    variables = yolo_variables()
    files.write(path, torch.to_state_dict('yolov4_tiny', variables, **YOLO), {'format': 'pt'})
    _, loaded, report = load_pretrained(name, path, width=0.125, num_classes=2, **asked)
    gates = {path for path in report.new if '_attention/' in path}
    assert len(gates) == 3 * arrays
    assert set(report.new) == gates | YOLO_HEADS
    assert_same(loaded, variables, but=report.new)


@pytest.mark.parametrize(
    ('prefix', 'attention', 'classes'), [('', None, 0), ('backbone.', None, 0), ('', 'eca', 5)]
)
def test_a_backbone_alone(tmp_path, prefix, attention, classes):
    path = tmp_path / 'x.safetensors'
    variables = yolo_variables('darknet53_tiny', num_classes=classes)
    facts = {'width': 0.125, 'num_classes': classes}
    state = torch.to_state_dict('darknet53_tiny', variables, **facts)
    files.write(path, {f'{prefix}{k}': v for k, v in state.items()}, {'format': 'pt'})
    arguments = {'width': 0.125, 'attention': attention}
    _, loaded, report = load_pretrained('yolov4_tiny', path, num_classes=3, **arguments)
    assert len(report.ignored) == (2 if classes else 0)
    for kind in ('params', 'batch_stats'):
        variables[kind].pop('head', None)
        assert_same(loaded[kind]['backbone'], variables[kind])
    assert set(report.new) > YOLO_HEADS
    assert not any('/backbone/' in path for path in report.new)
    with pytest.raises(ValueError, match=r"'backbone'; \d+ missing: .*head16/bias"):
        load_pretrained('yolov4_tiny', path, **arguments)


def test_own_file_keeps_everything(tmp_path):
    path = tmp_path / 'x.safetensors'
    arguments = {
        'attention': 'self_attention',
        'attention_args': {'spectral_norm': True},
        'placement': 'branch@2',
        'num_classes': 4,
        'param_dtype': jnp.bfloat16,
    }
    variables = variables_of(**arguments)
    variables['params'] = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables['params'])
    facts = Preprocessing((0.1,), (0.2,), 0.9, 'bicubic', (20, 30))
    cards.save(
        path,
        NAME,
        variables,
        arguments=arguments,
        source='here',
        licence='MIT',
        preprocessing=facts,
    )
    module, loaded, report = load_pretrained(NAME, path)
    assert_same(loaded, variables)
    assert set(loaded) == {'params', 'batch_stats', 'spectral'}
    assert module == attention_jax.create_model(NAME, **{**arguments, 'param_dtype': 'bfloat16'})
    assert report.preprocessing == facts
    card = cards.read_card(path)
    assert (card.model, card.source, card.licence) == (NAME, 'here', 'MIT')
    assert card.version == attention_jax.__version__
    assert [p.name for p in tmp_path.iterdir()] == ['x.safetensors']


def test_own_file_of_a_mechanism(tmp_path):
    path = tmp_path / 'gc.safetensors'
    module = attention_jax.create_attention('gc', reduction=4)
    variables = helpers.random_variables(module, jnp.ones((1, 4, 4, 32)), dtype=np.float32)
    cards.save(path, 'gc', variables, arguments={'reduction': 4})
    loaded_module, loaded, report = load_pretrained('gc', path)
    assert loaded_module == module
    assert_same(loaded, variables)
    assert report.preprocessing is None
    with pytest.raises(ValueError, match='reduction 4, and 8 was asked for'):
        load_pretrained('gc', path, reduction=8)
    files.write(path, torch.to_state_dict('gc', variables, reduction=4), {})
    assert_same(load_pretrained('gc', path, reduction=4)[1], variables)


@pytest.mark.parametrize(
    ('saved', 'asked', 'message'),
    [
        ({}, {'name': 'cifar_resnet20'}, "holds 'tiny_resnet', not 'cifar_resnet20'"),
        ({}, {'shortcut': 'conv'}, "shortcut 'pad', and 'conv' was asked for"),
        ({'attention': 'se'}, {'attention': 'eca'}, "attention 'se', and 'eca' was asked for"),
        ({'attention': 'se'}, {'identity_init': True}, 'identity_init False, and True'),
        ({}, {'num_class': 3}, 'no argument'),
    ],
)
def test_own_file_is_of_one_model(tmp_path, saved, asked, message):
    path = tmp_path / 'x.safetensors'
    cards.save(path, NAME, variables_of(**saved), arguments=saved)
    with pytest.raises(ValueError, match=message):
        load_pretrained(asked.pop('name', NAME), path, **asked)


def test_what_cannot_be_saved_leaves_nothing(tmp_path):
    variables = {'params': {'a': np.ones(2)}}
    with pytest.raises(ValueError, match=r'must end in \.safetensors'):
        cards.save(tmp_path / 'x.pth', NAME, variables)
    with pytest.raises(ValueError, match='there is no folder'):
        cards.save(tmp_path / 'no' / 'x.safetensors', NAME, variables)
    with pytest.raises(ValueError, match='has no argument'):
        cards.save(tmp_path / 'x.safetensors', NAME, variables, arguments={'depth': 3})
    variables = {'params': {'a': np.array(['text'])}}
    with pytest.raises(SafetensorError, match='dtype'):
        cards.save(tmp_path / 'x.safetensors', NAME, variables)
    assert not list(tmp_path.iterdir())


def cut(path, end):
    path.write_bytes(path.read_bytes()[:end])


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (lambda p: cut(p, -10), 'is no whole safetensors file'),
        (lambda p: cut(p, 30), 'is no whole safetensors file'),
        (lambda p: cut(p, 0), 'is an empty file'),
        (lambda p: p.write_text('hello, these are no weights at all'), 'no whole safetensors file'),
        (lambda p: p.unlink(), 'does not exist: give a file'),
        (lambda p: write_foreign(p, without=['fc.bias']), r'does not fit.*1 missing: fc\.bias'),
        (
            lambda p: write_foreign(p, without=['layer2.0.bn1.weight']),
            r'1 missing: layer2\.0\.bn1\.weight',
        ),
        (lambda p: write_foreign(p, without=['fc.weight', 'fc.bias']), '2 missing: fc'),
        (lambda p: write_foreign(p, extra={'x.gain': np.ones(2)}), r'1 unused: x\.gain'),
        (
            lambda p: write_foreign(p, extra={'layer1.0.conv1.weight': np.ones((16, 8, 3, 3))}),
            r'1 mismatched: shape of layer1\.0\.conv1\.weight is \(16, 8, 3, 3\), ours \(3, 3, 16',
        ),
        (
            lambda p: write_foreign(p, attention='se'),
            r'12 unused: layer1\.0\.se\.fc.* and 2 more',
        ),
    ],
)
def test_bad_files_have_one_message(tmp_path, spoil, message):
    path = tmp_path / 'x.safetensors'
    write_foreign(path)
    spoil(path)
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(NAME, path)
    assert '\n' not in str(error.value)


def test_own_file_with_a_missing_or_changed_array(tmp_path):
    path = tmp_path / 'x.safetensors'
    for spoil, message in (
        (lambda v: v['params']['head'].pop('bias'), '1 missing: params/head/bias'),
        (lambda v: v['params'].update(more=np.ones(2)), '1 unused: params/more'),
        (
            lambda v: v['params']['stage1_block0']['conv1'].update(kernel=np.ones((3, 3, 4, 16))),
            'params/stage1_block0/conv1/kernel is',
        ),
    ):
        variables = variables_of()
        spoil(variables)
        cards.save(path, NAME, variables)
        with pytest.raises(ValueError, match=message):
            load_pretrained(NAME, path, num_classes=3)


def test_sources_that_are_no_weights(tmp_path):
    with pytest.raises(ValueError, match='holds no run'):
        load_pretrained(NAME, tmp_path)
    text = tmp_path / 'weights.txt'
    text.write_text('x')
    with pytest.raises(ValueError, match=r'nor a file that ends in one of \.safetensors'):
        load_pretrained(NAME, text)
    with pytest.raises(ValueError, match='did you mean tiny_resnet'):
        load_pretrained('tiny_resnt', text)


def test_torch_files_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch', None)
    path = tmp_path / 'x.pth'
    path.write_bytes(b'anything')
    with pytest.raises(ValueError, match=r'PyTorch, which is not installed: pip install .*parity'):
        load_pretrained(NAME, path)


def test_preprocessing_is_the_cards_or_timms_or_the_usual(tmp_path):
    path = tmp_path / 'x.safetensors'
    write_foreign(path)
    read = pretrained.read_preprocessing
    assert read(NAME, path) == Preprocessing(input_size=(32, 32))
    assert read('seresnet50', path).interpolation == 'bicubic'  # a network of timm's
    (tmp_path / 'config.json').write_text(json.dumps({'of': 'something else'}))
    assert read(NAME, path) == Preprocessing(input_size=(32, 32))
    (tmp_path / 'config.json').write_text(json.dumps(TIMM))
    timms = Preprocessing((0.5,) * 3, (0.2,) * 3, 0.95, 'bicubic', (40, 48))
    assert load_pretrained(NAME, path)[2].preprocessing == timms
    stated = Preprocessing(crop=1.0)
    cards.save(path, NAME, variables_of(), preprocessing=stated)
    assert read(NAME, path) == stated
    (tmp_path / 'config.json').write_text('{')
    with pytest.raises(ValueError, match='not JSON'):
        read(NAME, path)
    for wrong in ({'crop': 0}, {'interpolation': 'cubic'}, {'std': (1.0,)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Preprocessing(**wrong)


def test_data_are_prepared_as_the_weights_want():
    digits = types.SimpleNamespace(data=types.SimpleNamespace(name='digits', image_size=28))
    own = open_split(digits, 'test[:2]')
    facts = Preprocessing((0.1,), (0.2,), 0.9, 'nearest')
    other = open_split(digits, 'test[:2]', facts)
    description = other.description
    assert (description.mean, description.std) == ((0.1,), (0.2,))
    assert (description.crop, description.interpolation) == (0.9, 'nearest')
    assert description.image_shape == own.description.image_shape == (28, 28, 1)
    assert (other.images != own.images).any()
    of_colour = open_split(digits, 'test[:2]', Preprocessing())
    assert of_colour.description.mean == own.description.mean


def test_evaluation_crops_and_resizes_as_the_weights_want():
    images = np.random.default_rng(0).integers(0, 256, (1, 20, 30, 3), np.uint8)
    facts = {'mean': (0.5,) * 3, 'std': (0.5,) * 3, 'crop': 0.5, 'interpolation': 'nearest'}
    description = Description('x', (8, 8, 3), 2, ('a', 'b'), {'test': 1}, flip=True, **facts)
    source = Source(description, 'test', 'random_resized_crop', images, np.zeros(1, np.int32))
    (batch,) = data.eval_batches(source, types.SimpleNamespace(), batch_size=1)
    wanted = transforms.resize_and_crop(Image.fromarray(images[0]), (8, 8), 2, 'nearest')
    np.testing.assert_array_equal(batch['image'][0], wanted)


# The hub


def fake_hub(monkeypatch, found):
    """A huggingface_hub that has these files, or raises what it is given."""
    asked = []

    class EntryNotFoundError(Exception):
        pass

    class LocalEntryNotFoundError(EntryNotFoundError):
        pass

    def hf_hub_download(repository, name, revision=None):
        asked.append((repository, name, revision))
        if isinstance(found, Exception):
            raise found
        if found is None:
            raise LocalEntryNotFoundError('no connection\nand a long explanation')
        if name not in found:
            raise EntryNotFoundError(name)
        return str(found[name])

    hub = types.ModuleType('huggingface_hub')
    hub.hf_hub_download = hf_hub_download
    hub.errors = types.ModuleType('huggingface_hub.errors')
    hub.errors.EntryNotFoundError = EntryNotFoundError
    hub.errors.LocalEntryNotFoundError = LocalEntryNotFoundError
    monkeypatch.setitem(sys.modules, 'huggingface_hub', hub)
    monkeypatch.setitem(sys.modules, 'huggingface_hub.errors', hub.errors)
    return asked


def test_hub_ids(tmp_path, monkeypatch):
    path = tmp_path / 'blob.safetensors'
    variables = write_foreign(path)
    config = tmp_path / 'config-blob'
    config.write_text(json.dumps(TIMM))
    asked = fake_hub(monkeypatch, {'model.safetensors': path, 'config.json': config})
    _, loaded, report = load_pretrained(NAME, 'timm/tiny_resnet.a1')
    assert_same(loaded, variables)
    assert report.preprocessing.crop == 0.95
    assert asked[0] == ('timm/tiny_resnet.a1', 'model.safetensors', None)
    load_pretrained(NAME, 'hf_hub:some.one/net@v1')
    assert asked[-1] == ('some.one/net', 'config.json', 'v1')
    fake_hub(monkeypatch, {'model.safetensors': path})
    assert load_pretrained(NAME, 'a/b')[2].preprocessing.crop == 0.875
    fake_hub(monkeypatch, {'config.json': config})
    with pytest.raises(ValueError, match=r'the hub has none of model\.safetensors'):
        load_pretrained(NAME, 'a/b')


def test_hub_that_cannot_be_reached(monkeypatch):
    for failure, words in ((None, 'no connection$'), (OSError('refused'), 'refused$')):
        fake_hub(monkeypatch, failure)
        with pytest.raises(ValueError, match=f'runs/x is no file.*not in the cache: {words}'):
            load_pretrained(NAME, 'runs/x')
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(ValueError, match=r'pip install .*\[hub\]'):
        load_pretrained(NAME, 'timm/tiny_resnet.a1')


def test_the_hubs_own_errors_offline(monkeypatch, tmp_path):
    constants = pytest.importorskip(
        'huggingface_hub.constants', reason="it is not installed: pip install '.[hub]'"
    )
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    with pytest.raises(ValueError, match='not in the cache'):
        load_pretrained(NAME, 'timm/tiny_resnet.a1')
    # The cache as the hub's package lays it out.
    folder = tmp_path / 'models--timm--tiny_resnet.a1'
    commit = '0' * 40
    (folder / 'refs').mkdir(parents=True)
    (folder / 'refs' / 'main').write_text(commit)
    (folder / 'snapshots' / commit).mkdir(parents=True)
    variables = write_foreign(folder / 'snapshots' / commit / 'model.safetensors')
    assert_same(load_pretrained(NAME, 'timm/tiny_resnet.a1')[1], variables)


# PyTorch's own files


@pytest.fixture
def pytorch():
    return pytest.importorskip('torch', reason="PyTorch is not installed: pip install '.[parity]'")


def state_of(pytorch, variables):
    return {k: pytorch.tensor(v) for k, v in torch.to_state_dict(NAME, variables).items()}


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('ending', files.TORCH_ENDINGS)
def test_torch_files(pytorch, tmp_path, ending, legacy):
    variables = variables_of()
    state = state_of(pytorch, variables)
    state['fc.weight'] = pytorch.nn.Parameter(state['fc.weight'].t().contiguous().t())
    half = {k: v.to(pytorch.bfloat16) for k, v in state.items()}
    for tree, dtype in (
        (state, np.float32),
        ({'epoch': 3, 'state_dict': {f'module.{k}': v for k, v in state.items()}}, np.float32),
        ({'model': half, 'optimizer': {'state': {}}}, jnp.bfloat16),
        ({'net': state, 'acc': 93.1}, np.float32),
    ):
        path = tmp_path / f'x{ending}'
        pytorch.save(tree, path, _use_new_zipfile_serialization=not legacy)
        loaded = load_pretrained(NAME, path)[1]
        assert_same(loaded, jax.tree.map(lambda x, d=dtype: x.astype(d), variables))


class Harmful:
    """Its pickle makes a file when it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return pathlib.Path.touch, (self.marker,)


@pytest.mark.parametrize('legacy', [False, True])
def test_a_pickle_that_would_run_code_does_not(pytorch, tmp_path, legacy):
    path, marker = tmp_path / 'x.pth', tmp_path / 'ran'
    tree = {**state_of(pytorch, variables_of()), 'x': Harmful(marker)}
    pytorch.save(tree, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r'was refused: it holds .*could run code') as error:
        load_pretrained(NAME, path)
    assert '\n' not in str(error.value)
    assert not marker.exists()
    pytorch.load(path, weights_only=False)  # the file would have
    assert marker.exists()


@pytest.mark.parametrize('legacy', [False, True])
def test_bad_torch_files(pytorch, tmp_path, legacy):
    path = tmp_path / 'x.pth'
    pytorch.save(state_of(pytorch, variables_of()), path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    for end in (100, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r'x\.pth (is no whole PyTorch file|was refused)') as e:
            load_pretrained(NAME, path)
        assert '\n' not in str(e.value)
    for tree, message in (
        ({'fc.weight': 'text'}, "'fc.weight' is a str"),
        ([1, 2], 'holds list'),
        ({}, 'holds dict'),
    ):
        pytorch.save(tree, path)
        with pytest.raises(ValueError, match=message):
            load_pretrained(NAME, path)


# Runs


@pytest.mark.slow
def test_a_run_starts_from_weights_and_weights_from_a_run(tmp_path):
    from attention_jax.training import evaluate, load, train
    from attention_jax.training.workdir import read_config
    from configs import datasets

    path = tmp_path / 'x.safetensors'
    variables = variables_of(channels=1)
    facts = Preprocessing((0.3,), (0.4,), 0.9, 'bicubic')
    cards.save(path, NAME, variables, preprocessing=facts)

    config = datasets.get_config('digits')
    config.model.pretrained = str(path)
    config.model.attention = 'se'
    config.train.update({'steps': 2, 'batch_size': 16, 'ema_decay': 0.5})
    config.optimizer.learning_rate = 1e-30  # what is read is what is saved
    config.schedule.warmup_epochs = 0.0
    config.data.test_split = 'test[:40]'
    config.mesh.fsdp = 2
    workdir = tmp_path / 'run'
    summary = train(config, workdir)
    recorded = read_config(workdir).dataset
    assert (recorded.mean, recorded.crop, recorded.interpolation) == ([0.3], 0.9, 'bicubic')
    flat = traverse_util.flatten_dict(load(workdir)[1], sep='/')
    for key, value in traverse_util.flatten_dict(variables, sep='/').items():
        if key.startswith('params/'):
            np.testing.assert_allclose(flat[key], value, rtol=1e-6, err_msg=key)
    assert flat['params/stage1_block0/attention/fc1/kernel'].std() > 0

    # What goes on, or is evaluated, needs the weights no more.
    path.unlink()
    assert evaluate(config, workdir)['test/accuracy'] == summary['test/accuracy']
    (workdir / 'summary.json').unlink()
    assert train(config, workdir)['test/accuracy'] == summary['test/accuracy']

    module, _, report = load_pretrained(NAME, workdir, num_classes=3)
    assert sorted(report.new) == sorted(HEAD)
    assert (module.attention, module.num_classes) == ('se', 3)
    assert report.preprocessing == Preprocessing((0.3,), (0.4,), 0.9, 'bicubic', (32, 32))
    with pytest.raises(ValueError, match="holds 'tiny_resnet', not"):
        load_pretrained('cifar_resnet20', workdir)

    config.model.pretrained = str(tmp_path / 'missing.safetensors')
    with pytest.raises(ValueError, match='does not exist'):
        train(config, tmp_path / 'another')
    assert not (tmp_path / 'another').exists()
