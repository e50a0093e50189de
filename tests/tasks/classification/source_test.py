import io
import re
import subprocess
import sys
import types

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from attention_jax import data
from attention_jax.data import prepared
from attention_jax.tasks.classification import source


def opened(data_config, split, preprocessing=None):
    return source.open_split(types.SimpleNamespace(data=data_config), split, preprocessing)


def config(**settings):
    keys = ('name', 'data_dir', 'image_size', 'augment', 'workers', 'cache')
    return ConfigDict({key: settings.get(key) for key in keys})


def test_import_is_light():
    code = 'import sys, attention_jax.data; print(*sys.modules)'
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    heavy = {'tensorflow_datasets', 'tensorflow', 'grain', 'sklearn', 'torch'}
    assert not heavy & set(run.stdout.split())


def test_digits():
    from sklearn.datasets import load_digits

    digits = load_digits()
    train = opened(config(name='digits'), 'train')
    test = opened(config(name='digits'), 'test')
    is_test = np.arange(1797) % 5 == 4
    np.testing.assert_array_equal(train.labels, digits.target[~is_test])
    np.testing.assert_array_equal(test.labels, digits.target[is_test])
    assert (len(train), len(test)) == (1438, 359)
    assert train.images.shape == (1438, 32, 32, 1)
    assert train.images.dtype == np.uint8
    assert train.labels.dtype == np.int32
    assert (train.images.min(), train.images.max()) == (0, 255)
    # Bilinear with centres aligned: output pixel i reads position (i + 0.5) / 4 - 0.5 of 8.
    position = np.clip((np.arange(32) + 0.5) / 4 - 0.5, 0, 7)
    low = np.minimum(position.astype(int), 6)
    weight = position - low
    weights = np.zeros((32, 8))
    weights[np.arange(32), low] = 1 - weight
    weights[np.arange(32), low + 1] = weight
    expected = weights @ (digits.images[is_test] * 255 / 16) @ weights.T
    assert abs(test.images[..., 0] - expected).max() < 1.6  # uint8 before, between and after

    description = test.description  # of the data set, whatever the split
    assert description == train.description
    assert description.splits == {'train': 1438, 'test': 359}
    assert description.image_shape == (32, 32, 1)
    assert not description.flip
    assert description.num_classes == 10
    assert description.class_names == tuple('0123456789')
    np.testing.assert_allclose(description.mean, (train.images / 255).mean(), rtol=1e-6)
    np.testing.assert_allclose(description.std, (train.images / 255).std(), rtol=1e-6)


def test_digits_slices_and_size():
    settings = config(name='digits', image_size=48)
    whole = opened(settings, 'train')
    assert whole.images.shape[1:] == whole.description.image_shape == (48, 48, 1)
    first = opened(settings, 'train[:90%]')
    rest = opened(settings, 'train[90%:]+test')
    assert (len(first), len(rest)) == (1294, 144 + 359)
    np.testing.assert_array_equal(first.labels, whole.labels[:1294])
    np.testing.assert_array_equal(rest.labels[:144], whole.labels[1294:])
    np.testing.assert_array_equal(rest.images[0], whole.images[1294])


def test_plain_objects_serve_as_config():
    class Settings:
        name = 'digits'

    assert len(opened(Settings(), 'test')) == 359


@pytest.fixture(scope='session')
def tfds_dir(tmp_path_factory):
    """Three small data sets, prepared without TensorFlow; `small` has grey files among RGB."""
    import tensorflow_datasets as tfds

    features = tfds.features

    def prepare(name, feature, make, label, split_sizes, file_format='array_record'):
        class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            VERSION = tfds.core.Version('1.0.0')

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self,
                    features=features.FeaturesDict({'image': feature, 'label': label}),
                )

            def _split_generators(self, dl_manager):
                return {
                    key: ((i, {'image': make(i), 'label': i % 3}) for i in range(count))
                    for key, count in split_sizes.items()
                }

            def _generate_examples(self):
                raise NotImplementedError

        Builder.name = name
        Builder(data_dir=directory, file_format=file_format).download_and_prepare()

    def picture(i):
        rng = np.random.default_rng(i)
        return Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8))

    def jpeg(i):
        file = io.BytesIO()
        Image.new('RGB', (40 + i, 60 - i), (10 * i, 0, 0)).save(file, 'jpeg')
        return file.getvalue()

    directory = tmp_path_factory.mktemp('tfds')
    label = features.ClassLabel(names=['a', 'b', 'c'])
    png = features.Image(shape=(12, 10, 3), encoding_format='png')
    counts = {'train': 20, 'test': 7}
    prepare(
        'small_pictures',
        png,
        lambda i: picture(i).convert('L') if i == 3 else picture(i),
        label,
        counts,
    )
    prepare(
        'photos', features.Image(shape=(None, None, 3), encoding_format='jpeg'), jpeg, label, counts
    )
    prepare('numbers', png, picture, features.Scalar(np.int64), {'train': 2})
    return directory


def test_tfds_in_memory(tfds_dir, monkeypatch):
    monkeypatch.setattr(prepared, '_BLOCK', 8)
    source = opened(config(name='small_pictures', data_dir=str(tfds_dir)), 'train[:50%]+test')
    assert source.images.shape == (17, 12, 10, 3)
    assert source.augment == 'pad_crop_flip'
    description = source.description
    assert description.image_shape == (12, 10, 3)
    assert description.splits['train'] == 20
    assert description.class_names == ('a', 'b', 'c')
    assert description.mean == (0.485, 0.456, 0.406)
    made = {}
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 256, (12, 10, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels)
        made[np.asarray(picture.convert('L').convert('RGB') if i == 3 else picture).tobytes()] = i
    for image, label in zip(source.images, source.labels, strict=True):
        assert made[image.tobytes()] % 3 == label
    whole = opened(config(name='small_pictures', data_dir=str(tfds_dir)), 'train')
    assert sorted(made[image.tobytes()] for image in whole.images) == list(range(20))


def test_tfds_uncached_is_the_same(tfds_dir):
    settings = {'name': 'small_pictures', 'data_dir': str(tfds_dir), 'augment': 'none'}
    cached = opened(config(**settings, cache=True), 'train')
    uncached = opened(config(**settings, cache=False), 'train')
    assert uncached.images is None
    assert len(uncached) == len(cached) == 20
    for one, other in zip(
        data.eval_batches(cached, config(), batch_size=8),
        data.eval_batches(uncached, config(), batch_size=8),
        strict=True,
    ):
        for key, value in one.items():
            np.testing.assert_array_equal(value, other[key])
            assert value.dtype == other[key].dtype


def test_tfds_pictures_of_many_sizes(tfds_dir):
    settings = {'name': 'photos', 'data_dir': str(tfds_dir)}
    source = opened(config(**settings), 'train')
    assert source.images is None
    assert source.augment == 'random_resized_crop'
    assert source.description.image_shape == (224, 224, 3)
    assert source.description.flip
    source = opened(config(**settings, image_size=16), 'test')
    (batch,) = data.eval_batches(source, config(), batch_size=8)
    assert batch['image'].shape == (8, 16, 16, 3)
    for image, label, mask in zip(batch['image'], batch['label'], batch['mask'], strict=True):
        red = float(image[..., 0].mean())
        assert (image.std((0, 1)) == 0).all()
        assert mask == 0 or round(red / 10) % 3 == label
    forced = opened(config(**settings, image_size=16, augment='pad_crop', cache=True), 'test')
    assert forced.images.shape == (7, 16, 16, 3)


def test_real_cifar10(shared):
    import tensorflow_datasets as tfds

    directory = shared / 'data' / 'tfds'
    if not directory.is_dir():
        pytest.skip(f'CIFAR-10 not found: {directory}')

    source = opened(config(name='cifar10', data_dir=str(directory)), 'test')
    assert source.images.shape == (10_000, 32, 32, 3)
    assert source.augment == 'pad_crop_flip'
    assert np.bincount(source.labels).tolist() == [1000] * 10
    assert source.description.class_names[3] == 'cat'
    assert source.description.splits == {'train': 50_000, 'test': 10_000}
    records = tfds.data_source('cifar10', split='test', data_dir=str(directory), download=False)
    for i in [0, 1, 511, 512, 9_999]:
        np.testing.assert_array_equal(source.images[i], records[i]['image'])
        assert source.labels[i] == records[i]['label']
    # The two halves have one distribution, so the test part is near the stated numbers of train.
    values = source.images[:5000] / 255
    np.testing.assert_allclose(values.mean((0, 1, 2)), source.description.mean, atol=0.01)
    np.testing.assert_allclose(values.std((0, 1, 2)), source.description.std, atol=0.01)


@pytest.mark.parametrize(
    ('settings', 'split', 'words'),
    [
        ({'name': None}, 'train', ['data.name None', "'digits'"]),
        ({'name': 'digitz'}, 'train', ["'digitz'", "did you mean 'digits'"]),
        ({'name': 'cifar11'}, 'train', ["'cifar11'", "'cifar10'"]),
        ({'name': 'imagenet'}, 'train', ["'imagenet'", "'imagenet2012'"]),
        ({'name': 'CIFAR10'}, 'train', ["'CIFAR10'", "did you mean 'cifar10'"]),
        ({'name': 'emnist/no'}, 'train', ["data.name 'emnist/no'", 'letters']),
        ({'name': 'cifar10/no'}, 'train', ["data.name 'cifar10/no'"]),
        ({'name': 'digits'}, 'val', ["data.split 'val'", 'train (1,438 examples)', 'test (359']),
        ({'name': 'digits'}, 'train[:x]', ["data.split 'train[:x]'", "'train[:90%]'"]),
        ({'name': 'digits'}, 'train[:0%]', ['no examples']),
        ({'name': 'digits'}, None, ['data.split None', 'train (1,438']),
        ({'name': 'digits', 'image_size': 0}, 'train', ['data.image_size 0', 'positive']),
        ({'name': 'digits', 'image_size': '32'}, 'train', ["data.image_size '32'"]),
        ({'name': 'digits', 'augment': 'flip'}, 'train', ["data.augment 'flip'", 'pad_crop, ']),
        ({'name': 'digits', 'augment': 'pad_crop_flip'}, 'train', ['mirror', "use 'pad_crop'"]),
        ({'name': 'digits', 'cache': 'yes'}, 'train', ["data.cache 'yes'", 'True, False']),
        (
            {'name': 'cifar10', 'data_dir': '/not here'},
            'train',
            ["data.data_dir '/not here'", "tfds build cifar10 --data_dir='/not here'"],
        ),
        (
            {'name': 'mnist'},
            'train',
            ["'mnist' is not prepared", 'attention_jax[prepare]', '--file_format=array_record'],
        ),
        ({'name': 'imagenet2012'}, 'train', ['not prepared', 'downloads/manual']),
        ({'name': 'coco'}, 'train', ["'coco' is not prepared"]),
        ({'name': 'small_pictures'}, 'val', ['train (20 examples), test (7 examples)']),
        ({'name': 'numbers'}, 'train', ["'numbers'", 'ClassLabel']),
        ({'name': 'photos', 'cache': True}, 'train', ['data.cache True', 'pictures of one size']),
    ],
)
def test_errors(settings, split, words, tfds_dir, capfd):
    if settings['name'] != 'digits':
        settings = {'data_dir': str(tfds_dir), **settings}
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        opened(config(**settings), split)
    message = str(error.value)
    assert '\n' not in message
    for word in words:
        assert word in message
    assert capfd.readouterr() == ('', '')


def test_other_file_formats_are_refused(tfds_dir, tmp_path):
    import json
    import shutil

    shutil.copytree(tfds_dir / 'numbers', tmp_path / 'numbers')
    (info,) = tmp_path.rglob('dataset_info.json')
    written = json.loads(info.read_text())
    written['fileFormat'] = 'tfrecord'
    info.write_text(json.dumps(written))
    with pytest.raises(ValueError, match=r'stored as tfrecord.*--file_format=array_record'):
        opened(config(name='numbers', data_dir=str(tmp_path)), 'train')
