"""Whole runs of detection: the same loop, files and promises as of classification."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import attention_jax
from attention_jax import cli
from attention_jax.tasks.detection import scenes
from attention_jax.training import evaluate, metrics, train
from attention_jax.training.pretrained import preprocessing_of
from configs import yolov4_tiny


def make_config(**data):
    config = yolov4_tiny.get_config()
    config.model.attention = 'eca'
    config.model.arguments.width = 0.125
    config.data.image_size = 64
    config.data.test_split = 'test[:20]'
    config.data.update(data)
    config.schedule.warmup_epochs = 0.0
    config.train.update({'steps': 4, 'batch_size': 16, 'checkpoint_every': 2, 'log_every': 1})
    config.detection.max_detections = 20
    return config


@pytest.fixture(scope='module')
def finished(tmp_path_factory: pytest.TempPathFactory):
    workdir = tmp_path_factory.mktemp('finished')
    return workdir, train(make_config(), workdir)


def rows(workdir):
    timing = ('wall_time', 'images_per_second', 'data_wait')
    return [
        {k: v for k, v in row.items() if k not in timing}
        for row in metrics.read_rows(workdir / 'metrics.jsonl')
    ]


def test_results_are_the_public_ones(finished):
    workdir, summary = finished
    assert {'test/AP50', 'test/AP', 'test/AP50_voc', 'test/AP50/0', 'test/AP50/9'} <= set(summary)
    last = rows(workdir)[-1]
    assert {'train/loss', 'train/box', 'train/object', 'train/class'} <= set(last)
    assert last['test/AP50'] == summary['test/AP50']
    dataset = json.loads((workdir / 'config.json').read_text())['dataset']
    assert dataset['class_names'] == list('0123456789')
    events = EventAccumulator(str(workdir)).Reload()
    assert 'detections/0' in events.Tags()['images']


def test_a_crash_changes_no_bit(finished, tmp_path, monkeypatch):
    write = metrics.MetricsWriter.write

    def crash(self, row):
        write(self, row)
        if row['step'] == 3:
            raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(metrics.MetricsWriter, 'write', crash)
        with pytest.raises(RuntimeError):
            train(make_config(), tmp_path)
    train(make_config(), tmp_path)
    assert rows(tmp_path) == rows(finished[0])


def test_evaluation_alone_gives_the_same(finished, capsys):
    workdir, summary = finished
    results = evaluate(make_config(), workdir)
    assert results == {k: v for k, v in summary.items() if k.startswith('test/')}
    assert 'class  AP50' in capsys.readouterr().out


def test_a_run_from_weights_goes_on_without_them(finished):
    workdir, _ = finished
    config = make_config()
    config.model.pretrained = 'weights that are gone'
    assert preprocessing_of(config, workdir).input_size == (64, 64)


def test_a_run_is_a_source_of_weights(finished, tmp_path, capsys):
    workdir, _ = finished
    config = make_config()
    config.model.pretrained = str(workdir)
    config.optimizer.learning_rate = 1e-9
    config.train.steps = 1
    train(config, tmp_path / 'next')
    before, after = (attention_jax.load(w)[1]['params'] for w in (workdir, tmp_path / 'next'))
    for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    file = tmp_path / 'weights.safetensors'
    assert cli.main(['convert', str(workdir), str(file)]) == 0
    module, _, report = attention_jax.load_pretrained('yolov4_tiny', file)
    assert (module.attention, module.num_classes, report.new) == ('eca', 10, ())
    assert report.preprocessing.mean == (0.0, 0.0, 0.0)


def test_prediction_of_the_command_and_of_the_function_agree(finished, tmp_path, capsys):
    workdir, _ = finished
    picture = scenes.draw('test')[0][0]
    photo = tmp_path / 'scene.png'
    Image.fromarray(picture).resize((200, 120)).save(photo)
    broken = tmp_path / 'broken.jpg'
    broken.write_bytes(b'no picture')
    command = ['predict', str(workdir), str(photo), '--output', str(tmp_path / 'out')]
    assert cli.main([*command, '--score-threshold', '0.001']) == 0
    report = json.loads((tmp_path / 'out/scene.json').read_text())
    assert (report['width'], report['height']) == (200, 120)
    with Image.open(tmp_path / 'out/scene.png') as drawn:
        assert drawn.size == (200, 120)

    model, variables, config = attention_jax.load(workdir)
    found = attention_jax.predict(
        model, variables, Image.open(photo), score_threshold=0.001, iou_threshold=0.3
    )
    assert len(found['scores']) == len(report['boxes']) > 0
    np.testing.assert_allclose(found['boxes'], [row['box'] for row in report['boxes']], atol=0.006)
    assert [row['class'] for row in report['boxes']] == [
        config.dataset.class_names[c] for c in found['classes']
    ]
    lying = Image.open(photo).rotate(90, expand=True)  # and the camera says so: 6, turn clockwise
    exif = lying.getexif()
    exif[0x0112] = 6
    lying.save(tmp_path / 'lying.png', exif=exif)
    least = ['--score-threshold', '0.001']
    lying = ['predict', str(workdir), str(tmp_path / 'lying.png'), *command[3:]]
    assert cli.main([*lying, *least]) == 0
    again = json.loads((tmp_path / 'out/lying.json').read_text())
    assert (again['width'], again['height']) == (200, 120)
    corners = np.array([row['box'] for row in again['boxes']])
    assert (corners.min(0) >= 0).all()
    assert (corners.max(0) <= [200, 120, 200, 120]).all()
    of_file = attention_jax.predict(
        model, variables, Image.open(tmp_path / 'lying.png'), score_threshold=0.001
    )
    np.testing.assert_allclose(of_file['boxes'], corners, atol=0.006)
    with pytest.raises(
        ValueError, match=r'image must be uint8 \[h, w, 3\] .*, got uint8 \[0, 8, 3\]'
    ):
        attention_jax.predict(model, variables, np.zeros((0, 8, 3), np.uint8))

    maps = attention_jax.attention_maps(model, variables, np.zeros((1, 64, 64, 3), np.float32))
    assert set(maps) == {f'{place}_attention' for place in ('feat1', 'feat2', 'upsampled')}

    capsys.readouterr()
    assert cli.main([*command[:2], str(broken), str(photo), *command[3:]]) == 2
    said = capsys.readouterr()
    assert f'{broken}: cannot be read' in said.err
    assert 'error: 1 of 2 photos could not be read' in said.err
    assert f'{photo}: ' in said.out


@pytest.mark.parametrize(
    ('arguments', 'what'),
    [
        (['missing.jpg'], 'photo missing.jpg is not there'),
        (['a/x.jpg', 'b/x.png'], "two photos are called 'x'"),
        (['x.jpg', '--iou-threshold', '2'], '--iou-threshold must be in 0 to 1, got 2.0'),
        (['out/x.jpg'], 'is the folder of photo out/x.jpg, which could be overwritten'),
    ],
)
def test_wrong_options_of_predict(finished, tmp_path, arguments, what, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / 'out'
    assert cli.main(['predict', str(finished[0]), *arguments, '--output', str(out)]) == 2
    assert what in capsys.readouterr().err
    assert not out.exists()
    out.write_text('a file')
    assert cli.main(['predict', str(finished[0]), 'y.jpg', '--output', str(out)]) == 2
    assert f'--output {out} is a file: give a folder' in capsys.readouterr().err


def test_other_classes_are_refused(finished, tmp_path):
    workdir, _ = finished
    folder = voc_folder(tmp_path / 'voc', classes=('cat', 'dog'))
    config = make_config(name=f'voc:{folder}', test_split='train', split='train')
    copied = tmp_path / 'run'
    (copied / 'checkpoints').mkdir(parents=True)
    settings = json.loads((workdir / 'config.json').read_text())
    settings['data']['name'] = config.data.name
    (copied / 'config.json').write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r'trained on other classes than .*: 10 and 2, in their'):
        evaluate(config, copied)


def test_other_anchors_are_refused(finished):
    config = make_config()
    config.detection.anchors = tuple((w + 1, h) for w, h in config.detection.anchors)
    with pytest.raises(ValueError, match=r'belongs to another config: detection.anchors is'):
        evaluate(config, finished[0])


def test_a_test_split_of_other_classes_is_refused(tmp_path):
    folder = tmp_path / 'coco'
    (folder / 'annotations').mkdir(parents=True)
    for split, names in {'train': ('cat', 'dog'), 'val': ('dog',)}.items():
        (folder / split).mkdir()
        Image.new('RGB', (80, 60)).save(folder / split / 'a.jpg')
        document = {
            'images': [{'id': 1, 'file_name': 'a.jpg', 'height': 60, 'width': 80}],
            'annotations': [],
            'categories': [{'id': ord(name[0]), 'name': name} for name in names],
        }
        path = folder / 'annotations' / f'instances_{split}.json'
        path.write_text(json.dumps(document))
    config = make_config(name=f'coco:{folder}', split='train', test_split='val')
    workdir = tmp_path / 'run'
    with pytest.raises(ValueError, match=r"'val' .* has other classes .*: 2 and 1, .*missing: cat"):
        train(config, workdir)
    assert not workdir.exists()


def voc_folder(folder: pathlib.Path, classes, corners=(10, 10, 40, 50)):
    for name in ('Annotations', 'JPEGImages', 'ImageSets/Main'):
        (folder / name).mkdir(parents=True)
    for number, label in enumerate(classes):
        Image.new('RGB', (80, 60), 'white').save(folder / f'JPEGImages/{number}.jpg')
        (folder / f'Annotations/{number}.xml').write_text(
            f'<annotation><filename>{number}.jpg</filename><size><width>80</width>'
            f'<height>60</height><depth>3</depth></size><object><name>{label}</name>'
            '<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>'
            '</object></annotation>'.format(*corners)
        )
    (folder / 'ImageSets/Main/train.txt').write_text('\n'.join(map(str, range(len(classes)))))
    return folder


def test_anchors_are_printed_as_the_config_takes_them(tmp_path, capsys):
    folder = voc_folder(tmp_path / 'voc', classes=('cat', 'dog'))
    assert cli.main(['anchors', f'voc:{folder}', '--number', '1', '--size', '160']) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    anchors = '--config.detection.anchors="((60, 80),)"'
    assert last == f'{anchors} --config.detection.masks="((0,), (0,))"'
    assert cli.main(['anchors', f'voc:{folder}', '--split', 'test']) == 2
    assert "has no 'test'" in capsys.readouterr().err
    assert cli.main(['anchors', f'voc:{folder}', '--number', '1', '--seed', '-1']) == 2
    assert 'seed -1 must be at least 0' in capsys.readouterr().err
    assert cli.main(['anchors', 'digit_scene']) == 2
    assert "did you mean 'digit_scenes'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ('corners', 'what'),
    [
        ((0.1, 0.2, 0.6, 0.7), 'no box is left in .*: boxes in 0 to 1 instead of pixels, .*: 2'),
        ((40, 20, 10, 70), 'no box is left in .*: inverted boxes, left out: 2'),
    ],
)
def test_anchors_of_bad_boxes(tmp_path, corners, what, capsys):
    folder = voc_folder(tmp_path / 'voc', ('cat', 'dog'), corners)
    assert cli.main(['anchors', f'voc:{folder}', '--number', '1']) == 2
    assert re.search(what, capsys.readouterr().err)
