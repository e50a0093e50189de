import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from attention_jax.tasks.detection import annotations
from attention_jax.tasks.detection.annotations import Notes


def test_what_is_bad_is_left_out_and_counted():
    notes = Notes()
    rows = [
        ((10, 10, 20, 30), 0, None),
        ((10, 10, 10, 30), 0, 'boxes of no area'),
        ((5, 5, 5, 5), 0, 'boxes of no area'),
        ((20, 10, 10, 30), 0, 'inverted boxes'),
        ((120, 10, 130, 30), 0, 'boxes outside the picture'),
        ((-9, -9, 0, 0), 0, 'boxes outside the picture'),
        ((10, 10, 20, 30), -1, 'boxes of an unknown class'),
        ((10, float('nan'), 20, 30), 1, 'boxes that are not four numbers'),
        ((10, float('inf'), 20, 30), 1, 'boxes that are not four numbers'),
        ((-10, 10, 20, 90), 1, 'boxes that reached out of the picture'),
        ((90, 70, 100.5, 80), 2, None),  # half a pixel beyond is rounding
        ((0.25, 0.5, 0.75, 1), 0, 'boxes in 0 to 1 instead of pixels'),
        ((90, 70, 110, 80), 2, 'boxes that reached out of the picture'),  # centre on the border
    ]
    boxes, classes, why = zip(*rows, strict=True)
    found = annotations.checked('NAME', 'p', (80, 100), boxes, classes, [False] * 13, notes)
    expected = [(10, 10, 20, 30), (0, 10, 20, 80), (90, 70, 100, 80), (90, 70, 100, 80)]
    np.testing.assert_array_equal(found.boxes, expected)
    np.testing.assert_array_equal(found.classes, [0, 1, 2, 2])
    assert len(found.ignore) == 4
    kinds = set(filter(None, why))
    assert len(notes.lines()) == len(kinds)
    for kind in kinds:
        (line,) = [line for line in notes.lines() if line.startswith(kind)]
        assert line.endswith(f': {why.count(kind)} (the first in NAME)')
    lines = notes.lines()
    annotations.checked('NAME', 'p', (80, 100), boxes, classes, [False] * 13, notes)
    assert notes.lines() == lines  # each thing once
    nothing = annotations.checked('none', 'p', (80, 100), [], [], [], notes)
    assert nothing.boxes.shape == (0, 4)


def test_coco_files_that_are_none(tmp_path):
    path = tmp_path / 'instances_a.json'
    path.write_text('{"images": [')
    with pytest.raises(ValueError, match=r"data.name 'coco:x': .*instances_a.json' is not JSON"):
        annotations.coco_document('coco:x', path)
    path.write_text('{"images": [], "categories": 3}')
    with pytest.raises(ValueError, match='has no list annotations, categories'):
        annotations.coco_document('coco:x', path)
    path.write_text('[]')
    with pytest.raises(ValueError, match='has no list images, annotations, categories'):
        annotations.coco_document('coco:x', path)


@pytest.mark.parametrize('categories', [[], [{'id': 1}], [{'id': i, 'name': 'a'} for i in (1, 2)]])
def test_coco_categories_that_are_none(categories):
    with pytest.raises(ValueError, match="'categories' must be objects with an id and a name"):
        annotations.coco_categories('coco:x', {'categories': categories})


def test_coco(tmp_path):
    (tmp_path / 'sub').mkdir()
    for name in ('a.jpg', 'b.jpg', 'd.jpg', 'sub/e.jpg'):
        Image.new('RGB', (40, 30)).save(tmp_path / name)
    images = [
        {'id': 7, 'file_name': 'a.jpg', 'height': 30, 'width': 40},
        {'id': 9, 'file_name': 'b.jpg', 'height': 30, 'width': 40},
        {'id': 3, 'file_name': 'c.jpg', 'height': 30, 'width': 40},
        {'id': 4, 'file_name': 'd.jpg'},
        {'id': 5, 'file_name': 'd.jpg', 'height': math.inf, 'width': 40},
        'no object',
        {'id': '11', 'file_name': 'sub/e.jpg', 'height': 30, 'width': 40},
    ]
    items = [
        {'image_id': 7, 'category_id': 90, 'bbox': [1, 2, 10, 20], 'iscrowd': 0},
        {'image_id': 9, 'category_id': 5, 'bbox': [1, 2, 10.5, 20], 'iscrowd': 1},
        {'image_id': 7, 'category_id': 6, 'bbox': [1, 2, 10, 20]},
        {'image_id': 7, 'category_id': 5, 'bbox': [1, 2, 0, 20]},
        {'image_id': 7, 'category_id': 5, 'bbox': [1, 2, 10]},
        {'image_id': 7, 'category_id': 5},
        {'image_id': 1, 'category_id': 5, 'bbox': [1, 2, 10, 20]},
        {'image_id': 11, 'category_id': '90', 'bbox': [1, 2, 10, 20]},
        {'image_id': 11, 'category_id': {}, 'bbox': [1, 2, 10, 20]},
        {'image_id': [], 'category_id': 5, 'bbox': [1, 2, 10, 20]},
        None,
    ]
    document = {'categories': [{'id': 90, 'name': 'toothbrush'}, {'id': 5, 'name': 'cat'}]}
    categories = annotations.coco_categories('coco:x', document)
    assert categories == {5: 'cat', 90: 'toothbrush'}
    notes = Notes()
    document |= {'images': images, 'annotations': items}
    document = json.loads(json.dumps(document))
    one, other, inner = annotations.coco(tmp_path, document, slice(0, 7), list(categories), notes)
    np.testing.assert_array_equal(one.boxes, [[1, 2, 11, 22]])
    np.testing.assert_array_equal(other.boxes, [[1, 2, 11.5, 22]])
    assert [found.classes.tolist() for found in (one, other, inner)] == [[1], [0], [1]]
    assert (one.ignore.tolist(), other.ignore.tolist()) == ([False], [True])
    assert one.shape == (30, 40)
    assert notes.lines() == [
        f'annotations of no picture, left out: 3 (the first in {tmp_path.name})',
        'boxes of an unknown class, left out: 2 (the first in a.jpg)',
        'boxes that are not four numbers, left out: 2 (the first in a.jpg)',
        'boxes of no area, left out: 1 (the first in a.jpg)',
        'pictures that are not there, left out: 1 (the first in c.jpg)',
        'pictures without width and height, left out: 1 (the first in d.jpg)',
        f'pictures without name, left out: 1 (the first in {tmp_path.name})',
    ]
    assert annotations.coco(tmp_path, document, slice(2, 4), list(categories), Notes()) == []


def test_voc_folders_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=re.escape('is not a folder, and a Pascal VOC folder has')):
        annotations.voc_splits('voc:x', tmp_path / 'x')
    (tmp_path / 'JPEGImages').mkdir()
    with pytest.raises(ValueError, match=r'missing: Annotations, ImageSets/Main$'):
        annotations.voc_splits('voc:x', tmp_path)
    (tmp_path / 'Annotations').mkdir()
    (tmp_path / 'ImageSets' / 'Main').mkdir(parents=True)
    with pytest.raises(ValueError, match='holds no list of pictures'):
        annotations.voc_splits('voc:x', tmp_path)
    with pytest.raises(ValueError, match='no object in any of'):
        annotations.voc_classes('voc:x', [tmp_path])
    (tmp_path / 'classes.txt').write_text('cat\ndog\ncat\n')
    with pytest.raises(ValueError, match='must have a class a line, each once'):
        annotations.voc_classes('voc:x', [tmp_path])


@pytest.fixture
def voc(tmp_path):
    for part in ('Annotations', 'JPEGImages', 'ImageSets/Main'):
        (tmp_path / part).mkdir(parents=True)
    return tmp_path


def test_names_in_lists_may_have_spaces_and_a_mark_in_front(voc):
    lists = voc / 'ImageSets' / 'Main'
    (lists / 'train.txt').write_bytes(b'\xef\xbb\xbfmy photo\n 2007_1 \n\nmy photo\n')
    (lists / 'numbered.txt').write_text('photo 1\nphoto 2\n')
    (lists / 'cat_train.txt').write_text('2007_1  1\n2007_2 -1\n2007_3  0\n')
    (lists / 'empty.txt').write_text('')
    assert annotations.voc_splits('voc:x', voc) == {
        'empty': [],
        'numbered': ['photo 1', 'photo 2'],
        'train': ['my photo', '2007_1'],
    }
    (voc / 'classes.txt').write_bytes('caf\u00e9\n'.encode('latin-1'))
    with pytest.raises(ValueError, match=r"data.name 'voc:x': .*classes.txt' is not UTF-8"):
        annotations.voc_classes('voc:x', [voc])
    (voc / 'classes.txt').write_bytes(b'\xef\xbb\xbfcat\ndog\n')
    assert annotations.voc_classes('voc:x', [voc]) == ('cat', 'dog')


def test_voc_beside_files_of_other_tools(voc):
    written = '<annotation><object><name>cat</name></object></annotation>'
    encodings = {'a': 'utf-8', 'b': 'gb2312', 'c': 'no-such-encoding'}
    for name, encoding in encodings.items():
        Image.new('RGB', (40, 30)).save(voc / 'JPEGImages' / f'{name}.JPG', 'JPEG')
        for suffix in ('txt', 'json', 'xml'):  # labels that other tools put there
            (voc / 'JPEGImages' / f'{name}.{suffix}').write_text('no picture')
        text = f'<?xml version="1.0" encoding="{encoding}"?>{written}'
        (voc / 'Annotations' / f'{name}.xml').write_text(text)
    assert annotations.voc_classes('voc:x', [voc]) == ('cat',)
    notes = Notes()
    (found,) = annotations.voc(voc, ['a.JPG', 'b', 'c'], ['cat'], notes)
    assert (found.name, found.shape) == ('a', (30, 40))
    assert notes.lines() == [
        'boxes that are not four numbers, left out: 1 (the first in a)',
        'pictures whose annotation does not parse, left out: 2 (the first in b)',
    ]


def test_a_size_that_is_not_the_pictures_is_said(voc):
    Image.new('RGB', (40, 30)).save(voc / 'JPEGImages' / 'a.jpg')
    for size, notes in {(30, 40): 1, (40, 30): 0, (0, 0): 0}.items():
        (voc / 'Annotations' / 'a.xml').write_text(
            '<annotation><size><width>{}</width><height>{}</height></size></annotation>'.format(
                *size
            )
        )
        said = Notes()
        (found,) = annotations.voc(voc, ['a'], ['cat'], said)
        assert found.shape == (30, 40)
        assert len(said.lines()) == notes
