"""Whole runs of detection: the same loop, files and promises as of classification."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import attention_jax
from attention_jax import cli
from attention_jax.data import scenes
from attention_jax.training import evaluate, loop, metrics, train
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
    assert loop.preprocessing_of(config, workdir) is None


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
    assert cli.main(['predict', str(workdir), str(tmp_path / 'lying.png'), *command[3:]]) == 0
    again = json.loads((tmp_path / 'out/lying.json').read_text())
    assert (again['width'], again['height']) == (200, 120)

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
    ],
)
def test_wrong_options_of_predict(finished, tmp_path, arguments, what, capsys):
    out = tmp_path / 'out'
    assert cli.main(['predict', str(finished[0]), *arguments, '--output', str(out)]) == 2
    assert what in capsys.readouterr().err
    assert not out.exists()


def test_other_classes_are_refused(finished, tmp_path):
    workdir, _ = finished
    folder = voc_folder(tmp_path / 'voc', classes=('cat', 'dog'))
    config = make_config(name=f'voc:{folder}', test_split='train', split='train')
    copied = tmp_path / 'run'
    (copied / 'checkpoints').mkdir(parents=True)
    settings = json.loads((workdir / 'config.json').read_text())
    settings['data']['name'] = config.data.name
    (copied / 'config.json').write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r'trained on 10 classes and .* has 2'):
        evaluate(config, copied)


def voc_folder(folder: pathlib.Path, classes):
    for name in ('Annotations', 'JPEGImages', 'ImageSets/Main'):
        (folder / name).mkdir(parents=True)
    for number, label in enumerate(classes):
        Image.new('RGB', (80, 60), 'white').save(folder / f'JPEGImages/{number}.jpg')
        (folder / f'Annotations/{number}.xml').write_text(
            f'<annotation><filename>{number}.jpg</filename><size><width>80</width>'
            f'<height>60</height><depth>3</depth></size><object><name>{label}</name>'
            '<bndbox><xmin>10</xmin><ymin>10</ymin><xmax>40</xmax><ymax>50</ymax></bndbox>'
            '</object></annotation>'
        )
    (folder / 'ImageSets/Main/train.txt').write_text('\n'.join(map(str, range(len(classes)))))
    return folder


def test_anchors_are_printed_as_the_config_takes_them(tmp_path, capsys):
    folder = voc_folder(tmp_path / 'voc', classes=('cat', 'dog'))
    assert cli.main(['anchors', f'voc:{folder}', '--number', '1', '--size', '160']) == 0
    assert '--config.detection.anchors="((60, 80),)"' in capsys.readouterr().out.splitlines()[-1]
    assert cli.main(['anchors', f'voc:{folder}', '--split', 'test']) == 2
    assert "has no 'test'" in capsys.readouterr().err
