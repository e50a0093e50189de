import dataclasses
import io
import itertools
import re

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from attention_jax import data
from attention_jax.tasks.classification.source import Description, Source

CONFIG = ConfigDict({'workers': 0})
KINDS = ['none', 'pad_crop', 'pad_crop_flip', 'random_resized_crop', 'encoded']


def made_up(kind, count=53, size=8):
    """A source whose label is the position; 'encoded' is PNG files of several sizes."""
    rng = np.random.default_rng(5)
    description = Description(
        'made_up',
        (size, size, 3),
        count,
        tuple(map(str, range(count))),
        {'train': count},
        (0.5,) * 3,
        (0.5,) * 3,
        True,
    )
    if kind != 'encoded':
        images = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
        labels = np.arange(count, dtype=np.int32)
        return Source(description, 'train', kind, images=images, labels=labels)
    records = []
    for i in range(count):
        file = io.BytesIO()
        pixels = rng.integers(0, 256, (9 + i % 4, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, 'png')
        records.append({'image': file.getvalue(), 'label': i})
    return Source(description, 'train', 'random_resized_crop', records=records)


def take(source, count, state=None, config=CONFIG, **arguments):
    iterator = data.train_batches(source, config, **{'batch_size': 6, 'seed': 3, **arguments})
    if state is not None:
        iterator.set_state(state)
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


def assert_equal(batches, others):
    for one, other in zip(batches, others, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


@pytest.mark.parametrize('kind', KINDS)
def test_batches_depend_on_seed_and_number_alone(kind):
    source = made_up(kind)
    batches = take(source, 20)
    assert batches[0]['image'].shape == (6, 8, 8, 3)
    assert batches[0]['image'].dtype == np.uint8
    assert batches[0]['label'].shape == (6,)
    assert batches[0]['label'].dtype == np.int32
    assert_equal(batches, take(source, 20))
    assert_equal(batches[13:], take(source, 7, state={'next_index': 13}))
    other = take(source, 20, seed=4)
    assert any((x['label'] != y['label']).any() for x, y in zip(batches, other, strict=True))


@pytest.mark.parametrize('kind', ['pad_crop_flip', 'encoded'])
def test_state_counts_what_was_taken_not_what_was_prepared(kind):
    source = made_up(kind)
    iterator = data.train_batches(source, CONFIG, batch_size=6, seed=3)
    assert iterator.get_state() == {'next_index': 0}
    for _ in range(11):
        next(iterator)
    state = iterator.get_state()
    assert state == {'next_index': 11}
    rest = [next(iterator) for _ in range(5)]
    iterator.set_state(state)  # back, in the same iterator
    assert_equal(rest, [next(iterator) for _ in range(5)])
    iterator.close()
    assert_equal(rest, take(source, 5, state=state))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('processes', [2, 3])
def test_processes_share_the_global_batch(kind, processes):
    source = made_up(kind)
    whole = take(source, 12)  # beyond the first epoch: 53 examples are 8.8 batches
    parts = [take(source, 12, process_index=p, process_count=processes) for p in range(processes)]
    for number, batch in enumerate(whole):
        for key in batch:
            dealt = np.empty_like(batch[key])
            for p in range(processes):
                dealt[p::processes] = parts[p][number][key]
            np.testing.assert_array_equal(dealt, batch[key])


def test_every_example_once_an_epoch_in_a_new_order():
    batches = take(made_up('none'), 53)
    labels = np.concatenate([batch['label'] for batch in batches])
    epochs = labels[: 6 * 53].reshape(6, 53)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(53), (6, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_pictures_go_with_their_labels():
    source = made_up('none')
    for batch in take(source, 10):
        np.testing.assert_array_equal(batch['image'], source.images[batch['label']])


@pytest.mark.parametrize('kind', ['pad_crop', 'pad_crop_flip'])
def test_augmentation_is_drawn_anew_for_each_example_and_epoch(kind):
    source = made_up(kind)
    seen = {}
    for batch in take(source, 90):
        for image, label in zip(batch['image'], batch['label'], strict=True):
            seen.setdefault(int(label), []).append(image)
    assert all(len({image.tobytes() for image in images}) > 5 for images in seen.values())
    # Each is a window of the padded picture, mirrored only where that is asked for.
    flipped = 0
    for label, images in seen.items():
        padded = np.pad(source.images[label], ((4, 4), (4, 4), (0, 0)))
        windows = {padded[y : y + 8, x : x + 8].tobytes() for y in range(9) for x in range(9)}
        for image in images:
            plain, mirrored = image.tobytes() in windows, image[:, ::-1].tobytes() in windows
            assert plain or mirrored
            flipped += not plain
    assert (flipped > 150) == (kind == 'pad_crop_flip')


@pytest.mark.parametrize('flip', [True, False])
def test_random_resized_crops_are_mirrored_where_allowed(flip):
    source = made_up('random_resized_crop')
    # Rising from left to right, and so after any crop; falling after a mirror.
    source.images[:] = (np.arange(8, dtype=np.uint8) * 30)[:, None]
    source = dataclasses.replace(
        source, description=dataclasses.replace(source.description, flip=flip)
    )
    images = np.concatenate([batch['image'] for batch in take(source, 50)]).astype(int)
    falling = (images[:, 0, 0, 0] > images[:, 0, -1, 0]).sum()
    assert 110 < falling < 190 if flip else falling == 0


def test_evaluation_beside_random_resized_crops_takes_seven_eighths():
    source = made_up('random_resized_crop', count=1, size=32)
    source.images[:] = np.arange(32, dtype=np.uint8)[:, None]
    description = dataclasses.replace(source.description, image_shape=(14, 14, 3))
    source = dataclasses.replace(source, description=description)
    (batch,) = data.eval_batches(source, CONFIG, batch_size=1)
    # The side becomes 14 * 256 / 224 = 16, of which 1 is cut on either side.
    np.testing.assert_allclose(batch['image'][0, 0, :, 0], 2 * np.arange(1, 15) + 0.5, atol=0.51)


def test_draws_are_even():
    source = made_up('pad_crop_flip', count=1)
    offsets = []
    images = np.zeros((1, 8, 8, 3), np.uint8)
    images[0, 3, 4] = 255  # one bright point shows where the window was
    object.__setattr__(source, 'images', images)
    for batch in take(source, 800, batch_size=1):
        offsets += [tuple(point) for point in np.argwhere(batch['image'][0, ..., 0])]
    rows = np.bincount([row for row, _ in offsets], minlength=8)
    # Row 3 + 4 - offset for offsets 0..8: the point is in rows 7..0, or outside once in nine.
    assert (abs(rows - 800 * 8 / 9 / 9) < 45).all()


@pytest.mark.parametrize('kind', ['none', 'random_resized_crop', 'encoded'])
@pytest.mark.parametrize(('batch_size', 'processes'), [(6, 1), (53, 1), (60, 3), (8, 2), (54, 2)])
def test_evaluation_counts_every_example_once(kind, batch_size, processes):
    source = made_up(kind)
    parts = [
        data.eval_batches(
            source, CONFIG, batch_size=batch_size, process_index=p, process_count=processes
        )
        for p in range(processes)
    ]
    assert {len(part) for part in parts} == {-(-53 // batch_size)}
    labels = []
    for part in parts:
        batches = list(part)
        assert len(batches) == len(part)
        for batch in batches:
            local = batch_size // processes
            assert batch['image'].shape == (local, 8, 8, 3)
            assert batch['image'].dtype == np.uint8
            assert batch['label'].shape == (local,)
            assert batch['label'].dtype == np.int32
            assert batch['mask'].shape == (local,)
            assert batch['mask'].dtype == np.float32
            there = batch['mask'] == 1
            assert (batch['mask'][~there] == 0).all()
            assert (batch['image'][~there] == 0).all()
            assert (batch['label'][~there] == 0).all()
            labels += batch['label'][there].tolist()
        assert_equal(batches, list(part))  # it can be gone through again
    assert sorted(labels) == list(range(53))
    # In order: batch k of all processes together is the k-th block of examples.
    for k, batches in enumerate(zip(*parts, strict=True)):
        together = np.concatenate([batch['label'][batch['mask'] == 1] for batch in batches])
        expected = range(k * batch_size, min(53, (k + 1) * batch_size))
        assert sorted(together) == list(expected)


def test_evaluation_is_not_augmented():
    source = made_up('pad_crop_flip')
    (batch,) = data.eval_batches(source, CONFIG, batch_size=53)
    np.testing.assert_array_equal(batch['image'], source.images)


@pytest.mark.slow
def test_worker_processes_change_nothing():
    source = made_up('encoded')
    workers = ConfigDict({'workers': 2})
    batches = take(source, 9)
    iterator = data.train_batches(source, workers, batch_size=6, seed=3)
    assert_equal(batches[:4], [next(iterator) for _ in range(4)])
    state = iterator.get_state()
    assert state == {'next_index': 4}
    iterator.close()
    assert_equal(batches[4:], take(source, 5, state=state))
    assert_equal(batches[4:], take(source, 5, state=state, config=workers))
    assert_equal(
        list(data.eval_batches(source, CONFIG, batch_size=20)),
        list(data.eval_batches(source, workers, batch_size=20)),
    )


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        ({'batch_size': 7, 'process_count': 2}, ['train.batch_size 7', 'divisible', '2 processes']),
        ({'batch_size': 54}, ['train.batch_size 54', "'train'", '53 examples']),
        ({'process_index': 2, 'process_count': 2}, ['process_index 2']),
    ],
)
def test_errors(arguments, words):
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        take(made_up('none'), 1, **arguments)
    for word in words:
        assert word in str(error.value)
