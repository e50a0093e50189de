import io
import itertools
import json
import pickle
import re
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from attention_jax import data
from attention_jax.tasks.detection import reading, scenes
from attention_jax.tasks.detection.source import open_split


def config(max_boxes=6, **settings):
    keys = ('data_dir', 'image_size', 'augment', 'workers', 'cache')
    whole = dict.fromkeys(keys) | {'mosaic': 0.0, 'mixup': 0.0, 'mosaic_epochs': 0.7}
    whole |= {'scale': (0.25, 2.0)} | settings
    train = {'epochs': 10, 'steps': 0, 'batch_size': 2}
    return ConfigDict({'data': whole, 'detection': {'max_boxes': max_boxes}, 'train': train})


def xml(objects):
    items = ''.join(
        f'<object><name>{name}</name><difficult>{difficult}</difficult><part><name>head</name>'
        '<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part><bndbox>'
        + ''.join(
            f'<{k}>{v}</{k}>' for k, v in zip(('xmin', 'ymin', 'xmax', 'ymax'), box, strict=True)
        )
        + '</bndbox></object>'
        for name, box, difficult in objects
    )
    return f'<annotation>{items}</annotation>'


def write_voc(folder, pictures, splits):
    """`pictures`: {name: (color, objects)}, all of 60 x 80."""
    for part in ('Annotations', 'JPEGImages', 'ImageSets/Main'):
        (folder / part).mkdir(parents=True)
    for name, (color, objects) in pictures.items():
        Image.new('RGB', (80, 60), color).save(folder / 'JPEGImages' / f'{name}.jpg')
        (folder / 'Annotations' / f'{name}.xml').write_text(xml(objects))
    for split, names in splits.items():
        (folder / 'ImageSets' / 'Main' / f'{split}.txt').write_text('\n'.join(names) + '\n')
    return folder


@pytest.fixture
def voc(tmp_path):
    pictures = {
        'one': ('red', [('dog', (8, 6, 40, 30), 0), ('cat', (40, 30, 80, 60), 1)]),
        'two': ('blue', [('cat', (10, 10, 30, 40), 0), ('cat', (10, 10, 10, 40), 0)]),
        'three': ('white', []),
    }
    splits = {'train': ['one', 'two'], 'val': ['three'], 'dog_train': ['one  1', 'two -1']}
    return write_voc(tmp_path / 'voc', pictures, splits)


def test_voc(voc):
    source = open_split(config(name=f'voc:{voc}', image_size=(64, 96)), 'train+val', train=False)
    description = source.description
    assert description.class_names == ('cat', 'dog')
    assert (description.num_classes, description.image_shape) == (2, (64, 96, 3))
    assert description.splits == {'train': 2, 'val': 1}
    assert len(source) == 3
    assert source.in_memory
    first, second, third, padding = map(source.eval_example, range(4))
    assert {k: (v.shape, v.dtype) for k, v in first.items()} == {
        'image': ((64, 96, 3), np.uint8),
        'boxes': ((6, 4), np.float32),
        'classes': ((6,), np.int32),
        'ignore': ((6,), np.bool_),
        'shape': ((2,), np.int32),
        'mask': ((), np.float32),
    }
    # Over the sides of the photo, 80 x 60.
    expected = [24 / 80, 18 / 60, 32 / 80, 24 / 60]
    np.testing.assert_allclose(first['boxes'][0], expected, rtol=1e-6)
    assert (first['boxes'][2:] == 0).all()
    assert first['classes'].tolist() == [1, 0, -1, -1, -1, -1]
    assert first['ignore'].tolist() == [False, True, False, False, False, False]
    assert first['shape'].tolist() == [60, 80]
    assert np.abs(first['image'][32, 48] - [254.0, 0, 0]).max() < 3
    assert (first['image'][:, :5] == 128).all()
    assert second['classes'].tolist() == [0, -1, -1, -1, -1, -1]
    assert third['classes'].tolist() == [-1] * 6
    assert [x['mask'] for x in (first, second, third, padding)] == [1, 1, 1, 0]
    assert {k: (v.shape, v.dtype) for k, v in padding.items()} == {
        k: (v.shape, v.dtype) for k, v in first.items()
    }
    assert source.warnings() == [
        f'voc:{voc}, train+val: boxes of no area, left out: 1 (the first in two)'
    ]


def test_pictures_of_two_voc_folders_are_one_data_set(voc, tmp_path):
    pictures = {'four': ('red', [('bird', (1, 1, 9, 9), 0)]), 'five': ('blue', [])}
    other = write_voc(tmp_path / 'other', pictures, {'train': ['four'], 'test': ['five']})
    settings = config(name=f'voc:{voc}+{other}', image_size=64, augment='none')
    source = open_split(settings, 'train', train=False)
    assert source.description.class_names == ('bird', 'cat', 'dog')
    assert source.description.splits == {'train': 3, 'val': 1, 'test': 1}
    classes = [source.eval_example(i)['classes'].tolist()[:2] for i in range(len(source))]
    assert classes == [[2, 1], [1, -1], [0, -1]]
    assert len(open_split(settings, 'train[1:]+test', train=False)) == 3
    (voc / 'classes.txt').write_text('cat\ndog\nbird\n')
    assert open_split(settings, 'test', train=False).description.class_names[2] == 'bird'
    (other / 'classes.txt').write_text('bird\n')
    with pytest.raises(ValueError, match=r'classes.txt of its folders differ'):
        open_split(settings, 'test', train=False)
    with pytest.raises(ValueError, match='nowhere'):
        open_split(config(name=f'voc:{voc}+nowhere'), 'train', train=False)


def test_training_leaves_out_what_is_ignored(voc):
    settings = config(name=f'voc:{voc}', image_size=64, augment='none')
    source = open_split(settings, 'train', train=True)
    example = source.train_example((0, 0), np.random.default_rng(0))
    assert example.keys() == {'image', 'boxes', 'classes'}
    assert example['classes'].tolist() == [1, -1, -1, -1, -1, -1]
    # 80 x 60 becomes 64 x 48, 8 pixels from above.
    expected = [0.3, (18 * 0.8 + 8) / 64, 0.4, 24 * 0.8 / 64]
    np.testing.assert_allclose(example['boxes'][0], expected, rtol=1e-6)
    # The other picture has one good box, 20 x 30; anchors are of what is learnt, too.
    np.testing.assert_allclose(source.box_sizes(), [[32 * 0.8, 24 * 0.8], [20 * 0.8, 30 * 0.8]])


def test_a_class_list_decides_order_and_what_is_known(voc):
    (voc / 'classes.txt').write_text('dog\nbird\n')
    source = open_split(config(name=f'voc:{voc}'), 'train', train=False)
    assert source.description.class_names == ('dog', 'bird')
    assert source.eval_example(0)['classes'].tolist()[:2] == [0, -1]
    assert 'boxes of an unknown class, left out: 3 (the first in one)' in source.warnings()[0]


def test_evaluation_cuts_no_truth(voc):
    source = open_split(config(name=f'voc:{voc}', max_boxes=1), 'train', train=False)
    assert source.eval_example(0)['classes'].tolist() == [1, 0]


@pytest.mark.parametrize('cache', [True, False])
def test_bad_data_never_ends_a_run(voc, cache):
    shutil.copy(voc / 'JPEGImages' / 'one.jpg', voc / 'JPEGImages' / 'broken.jpg')
    whole = (voc / 'JPEGImages' / 'one.jpg').read_bytes()
    (voc / 'JPEGImages' / 'truncated.jpg').write_bytes(whole[: len(whole) - 60])
    (voc / 'JPEGImages' / 'empty.jpg').write_bytes(b'')
    shutil.copy(voc / 'JPEGImages' / 'one.jpg', voc / 'JPEGImages' / 'unlabelled.jpg')
    good = xml([('dog', (8, 6, 40, 30), 0)])
    for name in ('truncated', 'missing', 'empty'):
        (voc / 'Annotations' / f'{name}.xml').write_text(good)
    (voc / 'Annotations' / 'broken.xml').write_text(good[:50])
    names = ['one', 'missing', 'truncated', 'broken', 'empty', 'unlabelled', 'three']
    (voc / 'ImageSets' / 'Main' / 'train.txt').write_text('\n'.join(names))
    settings = config(name=f'voc:{voc}', image_size=64, cache=cache, max_boxes=1)
    source = open_split(settings, 'train', train=True)
    assert source.in_memory == cache
    assert len(source) == 3  # one, truncated, three
    evaluated = [source.eval_example(i) for i in range(4)]
    assert [x['mask'] for x in evaluated] == [1, 0, 1, 0]
    assert (evaluated[1]['classes'] == -1).all()
    rng = np.random.default_rng(0)
    for position in range(30):
        example = source.train_example((position, position % 3), rng)
        if position % 3 == 1:
            assert (example['classes'] == -1).all()
            assert example['image'].std() == 0
    lines = [line.removeprefix(f'voc:{voc}, train: ') for line in source.warnings()]
    assert sorted(lines) == [
        'pictures that are not there, left out: 1 (the first in missing)',
        'pictures that cannot be opened, left out: 1 (the first in empty)',
        'pictures that do not decode, grey without boxes in training, not evaluated: 1 '
        '(the first in truncated)',
        'pictures whose annotation does not parse, left out: 1 (the first in broken)',
        'pictures without annotation file, left out: 1 (the first in unlabelled)',
    ]
    (voc / 'ImageSets' / 'Main' / 'train.txt').write_text('missing\nempty\n')
    with pytest.raises(ValueError, match=r"'train' of 'voc:.*has no picture left: pictures that"):
        open_split(settings, 'train', train=True)


def test_more_boxes_than_there_is_room_for(tmp_path):
    boxes = [('a', (i, 0, i + 2 + i % 5, 30), 0) for i in range(0, 60, 3)]
    folder = write_voc(tmp_path / 'many', {'one': ('red', boxes)}, {'train': ['one']})
    settings = config(name=f'voc:{folder}', image_size=80, augment='none', max_boxes=4)
    source = open_split(settings, 'train', train=True)
    for _ in range(2):
        example = source.train_example((0, 0), np.random.default_rng(0))
        assert example['boxes'].shape == (4, 4)
        np.testing.assert_allclose(example['boxes'][:, 2] * 80, 6, rtol=1e-5)  # the largest
        assert (np.diff(example['boxes'][:, 0]) > 0).all()  # in their order
    (line,) = source.warnings()
    assert 'more than 4 boxes (detection.max_boxes), the largest kept: 1 (the first in one)' in line


def test_coco(tmp_path):
    folder = tmp_path / 'coco'
    (folder / 'annotations').mkdir(parents=True)
    for split, count in (('train', 4), ('val', 2)):
        (folder / split).mkdir()
        images = []
        for i in range(count):
            shape = (40 + i, 30)  # the last is not of the size that is written
            Image.new('RGB', shape, 'red').save(folder / split / f'{i}.png')
            images.append({'id': i, 'file_name': f'{i}.png', 'width': 40 + min(i, 2), 'height': 30})
        document = {
            'images': images,
            'annotations': [
                {'image_id': i, 'category_id': 3, 'bbox': [4, 3, 10, 12], 'iscrowd': int(i == 1)}
                for i in range(count)
            ],
            'categories': [{'id': 3, 'name': 'cat'}, {'id': 1, 'name': 'person'}],
        }
        (folder / 'annotations' / f'instances_{split}.json').write_text(json.dumps(document))
    settings = config(name=f'coco:{folder}', image_size=80)
    source = open_split(settings, 'train', train=False)
    assert source.description.class_names == ('person', 'cat')
    examples = [source.eval_example(i) for i in range(4)]
    assert [int(x['classes'][0]) for x in examples] == [1, 1, 1, -1]
    assert [bool(x['ignore'][0]) for x in examples] == [False, True, False, False]
    np.testing.assert_allclose(examples[0]['boxes'][0] * 80, [18, 24, 20, 32], rtol=1e-6)
    assert 'pictures of another size than their annotation says' in source.warnings()[0]
    part = open_split(settings, 'train[1:3]+val', train=True)
    assert len(part) == 4
    assert part.description.splits == {'train': 4, 'val': 2}
    with pytest.raises(ValueError, match=r"data.split 'test': .* has no 'test'; it has train, val"):
        open_split(settings, 'test', train=True)
    with pytest.raises(ValueError, match=re.escape("data.name 'coco:nowhere': 'nowhere' is not a")):
        open_split(config(name='coco:nowhere'), 'train', train=True)


def jpeg(size):
    file = io.BytesIO()
    Image.new('RGB', size, 'red').save(file, 'jpeg')
    return file.getvalue()


@pytest.fixture(scope='module')
def tfds_dir(tmp_path_factory):
    import tensorflow_datasets as tfds

    directory = tmp_path_factory.mktemp('tfds')
    features = tfds.features

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version('1.0.0')

        def _info(self):
            objects = {
                'bbox': features.BBoxFeature(),
                'label': features.ClassLabel(names=['a', 'b', 'c']),
                'is_crowd': features.Scalar(np.bool_),
            }
            image = features.Image(shape=(None, None, 3), encoding_format='jpeg')
            return tfds.core.DatasetInfo(
                builder=self,
                features=features.FeaturesDict(
                    {'image': image, 'objects': features.Sequence(objects)}
                ),
            )

        def _split_generators(self, dl_manager):
            def example(i):
                objects = [
                    {
                        'bbox': features.BBox(ymin=0.1, xmin=0.2, ymax=0.6, xmax=0.4 + 0.1 * j),
                        'label': j % 3,
                        'is_crowd': j == 1,
                    }
                    for j in range(i)
                ]
                return i, {'image': jpeg((40 + i, 30)), 'objects': objects}

            return {'train': map(example, range(4)), 'test': map(example, range(4))}

        def _generate_examples(self):
            raise NotImplementedError

    Builder.name = 'boxed'
    Builder(data_dir=directory, file_format='array_record').download_and_prepare()
    return directory


@pytest.mark.parametrize('cache', [None, True])
def test_tfds(tfds_dir, cache):
    settings = config(name='boxed', data_dir=str(tfds_dir), image_size=50, max_boxes=2, cache=cache)
    source = open_split(settings, 'test', train=False)
    assert source.in_memory == bool(cache)
    assert source.description.class_names == ('a', 'b', 'c')
    assert source.description.splits == {'train': 4, 'test': 4}
    examples = {}
    for i in range(4):
        example = source.eval_example(i)
        examples[int((example['classes'] >= 0).sum())] = example
    assert sorted(examples) == [0, 1, 2, 3]  # all three, though max_boxes is 2
    example = examples[3]
    assert example['classes'].tolist() == [0, 1, 2]
    assert example['ignore'].tolist() == [False, True, False]
    assert example['shape'].tolist() == [30, 43]
    np.testing.assert_allclose(example['boxes'][0], [0.3, 0.35, 0.2, 0.5], rtol=1e-5)
    train = open_split(settings, 'train[:2]', train=True)
    assert len(train) == 2
    assert train.eval_boxes == 2


def test_tfds_without_boxes(tmp_path):
    with pytest.raises(ValueError, match="'mnist' is not prepared"):
        open_split(config(name='mnist', data_dir=str(tmp_path)), 'train', train=True)
    from tensorflow_datasets import features

    plain = features.FeaturesDict({'image': features.Image(), 'label': features.ClassLabel()})
    with pytest.raises(ValueError, match="'image' and 'objects' with 'bbox' and 'label'"):
        reading._objects('cifar10', plain)


def test_digit_scenes():
    test = open_split(config(name='digit_scenes', max_boxes=16), 'test', train=False)
    assert len(test) == 250
    assert test.description.image_shape == (128, 128, 3)
    assert test.description.class_names == tuple('0123456789')
    assert test.description.splits == {'train': 1000, 'test': 250}
    images, boxes, classes = scenes.draw('test')
    example = test.eval_example(3)
    np.testing.assert_array_equal(example['image'], images[3])
    np.testing.assert_array_equal(example['classes'][: len(classes[3])], classes[3])
    x1, y1, x2, y2 = boxes[3][0] / 128
    np.testing.assert_allclose(
        example['boxes'][0], [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
    )
    assert not test.flip
    assert test.gains[0] == 0
    assert len(open_split(config(name='digit_scenes'), 'test[:10%]', train=False)) == 25
    asked = config(name='digit_scenes', augment='random_scale')
    assert open_split(asked, 'test', train=True).flip


def test_mosaic_only_in_the_first_part_of_the_run(voc):
    settings = config(name=f'voc:{voc}', image_size=64, mosaic=1.0, mixup=1.0, max_boxes=50)
    source = open_split(settings, 'train', train=True)
    assert source.mosaic_until == 0.7 * 10 * 2
    rng = np.random.default_rng(0)

    def blue(position):
        # The first picture is red, on grey; blue comes from the other one.
        image = source.train_example((position, 0), rng)['image'].astype(int)
        return (image[..., 2] - image[..., 0] > 60).any()

    assert sum(blue(0) for _ in range(20)) > 5
    assert sum(blue(14) for _ in range(20)) == 0
    settings.train.steps = 50
    assert open_split(settings, 'train', train=True).mosaic_until == 0.7 * 50 * 2


def test_what_other_processes_find_is_counted(voc):
    picture = voc / 'JPEGImages' / 'two.jpg'
    picture.write_bytes(picture.read_bytes()[:-20])  # opens, does not decode
    settings = config(name=f'voc:{voc}', image_size=32, cache=False, workers=1)
    source = open_split(settings, 'train', train=False)
    before = source.warnings()
    assert len(source) == 2
    assert not any('decode' in line for line in before)
    for _ in range(2):
        batches = list(data.eval_batches(source, settings.data, batch_size=2))
        assert batches[0]['mask'].tolist() == [1, 0]
    name = f'voc:{voc}, train'
    wanted = 'do not decode, grey without boxes in training, not evaluated: 1 (the first in two)'
    assert source.warnings() == [*before, f'{name}: pictures that {wanted}']


@pytest.mark.parametrize('mosaic', [0.0, 1.0])
def test_batches_depend_on_seed_and_number_alone(voc, mosaic):
    settings = config(name=f'voc:{voc}', image_size=32, mosaic=mosaic, mixup=0.5, mosaic_epochs=1)
    source = pickle.loads(pickle.dumps(open_split(settings, 'train+val', train=True)))

    def take(skip, process=0, processes=1):
        batches = data.train_batches(
            source,
            settings.data,
            batch_size=2,
            seed=3,
            process_index=process,
            process_count=processes,
        )
        batches.set_state({'next_index': skip})
        taken = list(itertools.islice(batches, 6 - skip))
        batches.close()
        return taken

    whole = take(0)
    assert whole[0]['image'].shape == (2, 32, 32, 3)
    assert whole[0]['boxes'].shape == (2, 6, 4)
    for one, other in zip(whole[2:], take(2), strict=True):
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])
    for process in range(2):
        for one, other in zip(whole, take(0, process, 2), strict=True):
            for key in one:
                np.testing.assert_array_equal(one[key][process::2], other[key])
    (first, second) = data.eval_batches(source, settings.data, batch_size=2)
    assert (first['mask'].tolist(), second['mask'].tolist()) == ([1, 1], [1, 0])


def test_real_blood_cells(shared):
    folder = shared / 'data' / 'bccd'
    if not folder.is_dir():
        pytest.skip(f'BCCD not found: {folder}')
    source = open_split(config(name=f'voc:{folder}', cache=False), 'trainval+test', train=False)
    assert source.description.class_names == ('Platelets', 'RBC', 'WBC')
    assert source.description.image_shape == (416, 416, 3)
    assert source.description.splits == {'test': 72, 'train': 205, 'trainval': 292, 'val': 87}
    assert len(source) == 364
    counts = np.bincount(
        np.concatenate([source.pictures.annotation(i).classes for i in range(364)])
    )
    assert counts.tolist() == [361, 4153, 372]
    assert source.eval_boxes == 30
    assert source.warnings() == [
        f'voc:{folder}, trainval+test: boxes of no area, left out: 2 '
        '(the first in BloodImage_00338)'
    ]
    example = source.eval_example(0)
    assert example['shape'].tolist() == [480, 640]
    assert (example['image'][:52] == 128).all()


@pytest.mark.parametrize(
    ('settings', 'split', 'words'),
    [
        ({'name': None}, 'train', ['data.name None', "'voc:PATH'"]),
        ({'name': 'digit_scenes'}, 'val', ["data.split 'val'", 'train (1,000 examples)']),
        ({'name': 'digit_scenes'}, 'test[:0%]', ['no examples']),
        ({'name': 'digit_scenes', 'augment': 'pad_crop'}, 'test', ["data.augment 'pad_crop'"]),
        ({'name': 'digit_scenes', 'image_size': 0}, 'test', ['data.image_size 0', 'two of them']),
        ({'name': 'digit_scenes', 'image_size': (1, 2, 3)}, 'test', ['data.image_size (1, 2, 3)']),
        ({'name': 'digit_scenes', 'cache': 'yes'}, 'test', ["data.cache 'yes'"]),
        ({'name': 'voc'}, 'train', ["data.name 'voc' has no PATH", "'voc:PATH'"]),
        ({'name': 'voc:'}, 'train', ["data.name 'voc:' has no PATH"]),
        ({'name': 'voc:/not here'}, 'train', ["'/not here' is not a folder", 'ImageSets/Main']),
    ],
)
def test_errors(settings, split, words, monkeypatch):
    monkeypatch.setitem(scenes.COUNTS, 'test', 2)
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        open_split(config(**settings), split, train=True)
    assert '\n' not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_split_that_is_not_there(voc):
    (voc / 'ImageSets' / 'Main' / 'empty.txt').write_text('')
    for split, words in (
        ('test', "has no 'test'; it has empty (0 examples), train (2 examples), val (1 examples)"),
        ('empty', "data.split 'empty' has no examples"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            open_split(config(name=f'voc:{voc}'), split, train=True)
